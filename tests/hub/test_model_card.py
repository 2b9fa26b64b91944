"""The card: what it says, and that a card which a person has edited is never overwritten."""

import dataclasses
import json
import shutil

import pytest
import yaml
from conftest import DIGITS_MODEL
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ddpm_hf import EvaluationReport
from ddpm_hf.hub.files import write_card
from ddpm_hf.hub.model_card import CardFacts, ModelFacts, generated_facts, make_card
from ddpm_hf.utils.text import public_name

MODEL = DIGITS_MODEL
FACTS = ModelFacts((3, 32, 32), 35_746_307, 1000, "epsilon", None)


def report() -> dict:
    made = EvaluationReport("cifar10", "test", 10_000)
    made.add("bits_per_dim", 3.7512, 0.011, {"estimator": "full sum"})
    words = "50000 samples (float) of 1000 network evaluations each, against 50000 images of train, inception features"
    fid = {"estimator": words, "num_samples": 50_000, "split": "train", "features": "inception"}
    made.values["fid_inception_train_float"] = {"value": 3.1711}  # no error known
    made.settings["fid_inception_train_float"] = fid
    made.add("is_inception_float", 9.46, 0.05, {"estimator": "50000 samples (float), 10 parts", "num_samples": 50_000})
    made.values["rmse"] = {"value": float("nan"), "standard_error": 0.1}  # as reports of earlier versions have it
    made.add("prior_bpd", 1.2345e-5, 1.2e-7, {"estimator": "L_T"})
    made.settings["sampling"] = {"sampler": "ddpm", "num_inference_steps": 1000, "seed": 0}
    made.settings["sampling"] |= {"network_evaluations": 2000, "guidance_scale": 1.5}
    made.warnings.append("few samples")
    return dataclasses.asdict(made)


def card(**changes) -> str:
    facts = {"name": "org/ddpm-cifar10", "dataset": "cifar10", "dataset_id": "uoft-cs/cifar10", "report": report()}
    facts |= {"recipe": {"updates": "800000 of 128 images"}, "sample": "samples.png", "license": "apache-2.0"}
    return make_card(FACTS, CardFacts(**(facts | changes)))


def test_a_card_says_all_that_a_stranger_wants_to_know():
    read = ModelCard(card())
    data = read.data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert (data.license, data.datasets) == ("apache-2.0", ["uoft-cs/cifar10"])
    assert {"ddpm", "diffusion"} <= set(data.tags)
    found = {result.metric_type: result for result in data.eval_results}
    assert {kind: result.metric_value for kind, result in found.items()} == {
        "bits_per_dim": 3.7512,
        "fid": 3.1711,
        "inception_score": 9.46,
        "prior_bpd": 1.2345e-5,
    }
    assert found["bits_per_dim"].metric_name == "bits/dim (10000 images of test, full sum)"
    assert found["fid"].metric_name.startswith(
        "FID (50000 samples (float) of 1000 network evaluations each, against 50000 images of train, inception"
    )
    assert (found["fid"].dataset_split, found["bits_per_dim"].dataset_split) == ("train", "test")
    for words in (
        "35,746,307",
        "3 x 32 x 32",
        "![samples](samples.png)",
        'from diffusers import DDPMPipeline\n\npipe = DDPMPipeline.from_pretrained("org/ddpm-cifar10")',
        'from ddpm_hf import DDPMPipeline\n\npipe = DDPMPipeline.from_pretrained("org/ddpm-cifar10")',
        "**3.751** ± 0.011",
        "**3.1711**\n",
        "prior_bpd (10000 images of test, L_T): **1.234e-05** ± 1.2e-07",
        "sampler ddpm, num_inference_steps 1000, network_evaluations 2000, seed 0, guidance_scale 1.5.",
        "Before you compare: few samples",
        "updates: 800000 of 128 images",
        "fraud, crime and misinformation",
        "biases of its training images",
        "ho2020ddpm",
    ):
        assert words in read.text or words in " ".join(read.text.split()), words
    assert "nan" not in card()


def test_snippets_say_what_stock_does_with_the_model():
    def text(**changes) -> str:
        return make_card(dataclasses.replace(FACTS, **changes), CardFacts("m"))

    assert "num_inference_steps=200" in text(num_train_timesteps=200)
    assert "class_labels=0" in text(classes=10)
    assert "its pipeline does not pass any" in text(classes=10)
    assert "does not know `posterior_mean`" in text(prediction_type="posterior_mean")
    assert "from diffusers" not in text(prediction_type="posterior_mean")


def test_a_card_without_numbers_picture_or_license():
    read = ModelCard(card(report=None, sample=None, license=None))
    assert read.data.eval_results is None
    assert read.data.license is None
    for words in ("None yet.", "No sample grid yet.", "None was stated"):
        assert words in read.text
    with pytest.raises(ValueError, match=r"write it like apache-2\.0"):
        card(license="Apache 2.0")


def test_facts_of_a_folder(tmp_path):
    facts = ModelFacts.read(MODEL)
    weights = load_file(MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    assert facts == ModelFacts((1, 8, 8), sum(w.numel() for w in weights.values()), 1000, "epsilon", None)


def test_a_generated_card_is_told_from_an_edited_one_and_knows_the_training():
    told = CardFacts("", "cifar10", "uoft-cs/cifar10", {"updates": "800000 of 128 images"}, license="apache-2.0")
    assert generated_facts(card()) == told
    assert generated_facts(card().replace("\n", "\r\n")) == told  # as Git on Windows has it
    assert (
        generated_facts(make_card(FACTS, CardFacts("m", recipe={"a": "x --> y\n\n## z"})))
        .recipe["a"]
        .startswith("x -->")
    )


def add_a_result(text: str) -> str:
    front = yaml.safe_load(text.split("---\n")[1])
    theirs = {"task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": [{"type": "human", "value": 7}]}
    front["model-index"][0]["results"].append(theirs)
    return f"---\n{yaml.safe_dump(front)}---\n" + text.split("---\n", 2)[2]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("# ddpm-cifar10", "# My model\n\nThanks, Ada."),
        lambda text: text.replace("research and teaching", "fun"),
        lambda text: text.replace("**3.751**", "**3.750**"),
        lambda text: text.replace("license: apache-2.0", "license: mit\nco2: 3"),
        lambda text: text.replace('"license": "apache-2.0"', '"license": "mit"'),
        lambda text: text[: text.index("## Citation")],
        lambda text: text + "Text after the last line.\n",
        add_a_result,
        lambda text: "# A card without front matter\n\nText.\n",
        lambda text: "---\ntags: [a\n---\nText.\n",
        lambda text: "---\nmodel-index: soon\n---\nText.\n",
        lambda text: "",
    ],
)
def test_an_edited_card_is_never_overwritten(tmp_path, edit):
    shutil.copytree(MODEL, tmp_path / "m")
    path = tmp_path / "m" / "README.md"
    path.write_text(edit(card()), encoding="utf-8")
    before = path.read_bytes()
    assert before != card().encode()
    assert not write_card(tmp_path / "m", CardFacts("m", "digits"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("digits", "digits"),
        ("/home/ada/secret/cats", "cats"),
        ("~/cats", "cats"),
        ("./data/cats", "cats"),
        (r"C:\ada\cats", "cats"),
        ("C:/ada/cats", "cats"),
    ],
)
def test_public_names(name, shown):
    assert public_name(name) == shown


def test_an_untouched_card_is_written_again(tmp_path):
    shutil.copytree(MODEL, tmp_path / "m")
    assert write_card(tmp_path / "m", CardFacts("m", "digits"))
    path = tmp_path / "m" / "README.md"
    assert "None yet." in path.read_text()
    assert write_card(tmp_path / "m", CardFacts("m", "digits", report=report()))
    assert path.read_text() == make_card(ModelFacts.read(tmp_path / "m"), CardFacts("m", "digits", report=report()))
    assert "**3.751**" in path.read_text()
    assert json.dumps(sorted(p.name for p in path.parent.iterdir())).count(".partial") == 0
