"""Fine-tuning: what a run keeps of the model that it starts from, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import make_small_unet
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, TrainingConfig
from ddpm_hf.cli import main
from ddpm_hf.training import initialization
from ddpm_hf.utils.errors import UserError

QUICK = {
    "preset": "digits",
    "max_train_steps": 4,
    "total_batch_size": 8,
    "lr_warmup_steps": 1,
    "checkpointing_steps": 2,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "eval_num_images": 0,
}
ROWS = torch.tensor([[1.0], [2.0], [6.0]]).expand(3, 64)  # class embeddings; the time embedding has 4 x 16 numbers


def save_model(folder: Path, scheduler: dict | None = None, rows: torch.Tensor | None = None, **network) -> str:
    """Save a model of 8x8 grey images as its folder; `rows` are its class embedding."""
    unet = make_small_unet(**({} if rows is None else {"num_class_embeds": len(rows)}), **network)
    if rows is not None:
        unet.class_embedding.weight.data.copy_(rows)
    process = {"num_train_timesteps": 50, "beta_end": 0.2, **(scheduler or {})}
    DDPMPipeline(unet, DDPMScheduler(**process)).save_pretrained(folder)
    return str(folder)


def save_images(folder: Path, *classes: str) -> str:
    for i in range(24):
        path = folder / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 60).save(path)
    return str(folder)


def trainer(folder: Path, **settings) -> Trainer:
    return Trainer(TrainingConfig(**{**QUICK, "output_dir": str(folder), **settings}))


@pytest.fixture
def model(tmp_path) -> str:
    return save_model(tmp_path / "model")


def test_a_model_that_was_saved_with_another_sampler(model, tmp_path):
    stock = diffusers.DDPMPipeline.from_pretrained(model)
    scheduler = diffusers.DDIMScheduler.from_config(stock.scheduler.config)
    diffusers.DDIMPipeline(stock.unet, scheduler).save_pretrained(tmp_path / "ddim")
    run = trainer(tmp_path / "run", init_from=str(tmp_path / "ddim"), max_train_steps=1)
    assert torch.equal(run.unet.conv_in.weight, stock.unet.conv_in.weight)
    trained = run.train().scheduler
    assert type(trained) is DDPMScheduler
    torch.testing.assert_close(trained.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)


LEARNED = {"variance_type": "learned_range", "loss": "hybrid"}
CLASSES = {"class_conditional": True, "class_dropout": 0.2}


@pytest.mark.parametrize("options", [{}, {"resolution": [16, 12]}, LEARNED, CLASSES, {**LEARNED, **CLASSES}])
def test_the_network_computes_what_it_computed_before(tmp_path, model, options):
    run = trainer(tmp_path / "run", init_from=model, **options)
    stock = diffusers.UNet2DModel.from_pretrained(model, subfolder="unet").eval()
    x_t = torch.randn(11, 1, *(options.get("resolution") or (8, 8)))
    t, labels = torch.arange(11) * 4, torch.arange(11) if "class_conditional" in options else None
    with torch.no_grad():
        expected = stock(x_t, t).sample
        assert expected.std() > 0.1
        assert torch.allclose(run.unet.eval()(x_t, t, labels).sample[:, :1], expected, atol=1e-5)


def test_weights_ema_and_process_are_the_model_s_and_the_recipe_is_the_preset_s(tmp_path, model, capsys):
    run = trainer(tmp_path / "run", init_from=model, learning_rate=1e-4)
    given = load_file(Path(model) / "unet" / "diffusion_pytorch_model.safetensors")
    assert run.recipe.ema_warmup  # which would start from zero otherwise
    for weights in (run.unet.state_dict(), run._ema_state_dict()):
        assert weights.keys() == given.keys()
        assert all(torch.equal(weights[name], value) for name, value in given.items())
    assert not run._adam.state
    assert run.recipe.scheduler["num_train_timesteps"] == 50
    assert (run.recipe.learning_rate, run.recipe.timestep_sampling) == (1e-4, "stratified")
    said = capsys.readouterr().out
    assert "--preset digits is the recipe only" in said
    differs = "num_train_timesteps 50, beta_end 0.2, variance_type fixed_small"
    assert f"taken from {model}, not from the preset: {differs}" in said


def test_colour_images_become_grey_for_a_grey_model(tmp_path, model, capsys):
    (tmp_path / "images").mkdir()
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "images" / "a.png")
    run = trainer(tmp_path / "run", preset="cifar10", init_from=model, train_data_dir=str(tmp_path / "images"))
    assert run.data.batch(torch.tensor([0]))[0].shape == (1, 1, 8, 8)
    assert ", in_channels 1" in capsys.readouterr().out


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_before_the_first_update_a_learned_variance_samples_as_the_fixed_one_did(tmp_path, variance):
    model = save_model(tmp_path / "model", {"variance_type": variance})
    run = trainer(tmp_path / "run", init_from=model, **LEARNED)
    tuned, given = run.publisher.pipeline(run._ema_state_dict()), DDPMPipeline.from_pretrained(model)
    assert tuned.scheduler.config.variance_type == "learned_range"

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(seeds=range(8), output_type="pt").images

    expected = images(given)
    assert torch.allclose(images(tuned), expected, atol=1e-5)
    tuned.unet.conv_out.bias.data[1] = 0.0  # a start between the two variances would be seen
    assert (images(tuned) - expected).abs().mean() > 0.01


def test_a_learned_variance_may_be_dropped(tmp_path, capsys):
    model = save_model(tmp_path / "model", {"variance_type": "learned_range"}, out_channels=2)
    run = trainer(tmp_path / "run", init_from=model, variance_type="fixed_large")
    given = load_file(Path(model) / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(run.unet.conv_out.weight, given["conv_out.weight"][:1])
    assert "had 2 output channels and has 1" in capsys.readouterr().out


def test_known_classes_keep_their_row_by_name(tmp_path, capsys):
    names = {"_class_names": ["cat", "dog"], "_null_class": 2}
    model = save_model(tmp_path / "model", rows=ROWS, **names)
    images = save_images(tmp_path / "images", "ape", "dog", "eel")
    run = trainer(tmp_path / "run", init_from=model, train_data_dir=images, **CLASSES)
    assert run.unet.class_embedding.weight[:, 0].tolist() == [1.5, 2.0, 1.5, 6.0]  # ape, dog, eel, no class
    said = capsys.readouterr().out
    assert (
        "kept: dog, no class; classes new, starting at the mean of those known: ape, eel; classes dropped: cat" in said
    )
    without = trainer(tmp_path / "b", init_from=model, train_data_dir=images, class_conditional=True)
    assert len(without.unet.class_embedding.weight) == 3
    assert "classes dropped: cat, no class" in capsys.readouterr().out


def test_classes_of_stock_s_networks_are_called_by_their_numbers(tmp_path, capsys):
    model = save_model(tmp_path / "model", rows=ROWS)
    images = save_images(tmp_path / "images", "2", "3")
    run = trainer(tmp_path / "run", init_from=model, train_data_dir=images, **CLASSES)
    assert run.unet.class_embedding.weight[:, 0].tolist() == [6.0, 3.0, 3.0]
    assert "kept: 2; classes new, starting at the mean of those known: 3, no class" in capsys.readouterr().out


@pytest.mark.parametrize(
    "modes",
    [
        {},
        {**LEARNED, **CLASSES, "mixed_precision": "bf16", "channels_last": True, "train_batch_size": 4},
        {"gradient_checkpointing": True, "resolution": 16},
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_run_resumes_to_the_same_bits_when_its_model_is_gone(tmp_path, model, modes, named, capsys):
    whole = trainer(tmp_path / "whole", init_from=model, **modes).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    shutil.rmtree(model)
    again = {"init_from": model} if named else {}
    which = "checkpoint-2" if named else "latest"
    resumed = trainer(tmp_path / "resumed", resume_from_checkpoint=which, **again, **modes)
    assert resumed.step == 2
    said = capsys.readouterr().out
    assert ("was for its start" in said) == named
    resumed = resumed.train()
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(value, resumed.unet.state_dict()[name])
    assert whole.scheduler.config == resumed.scheduler.config
    for snapshot in (tmp_path / "whole" / "ema").iterdir():
        if snapshot.stem in ("update-3", "update-4"):  # those that both runs have made
            assert snapshot.read_bytes() == (tmp_path / "resumed" / "ema" / snapshot.name).read_bytes()
    cards = [(tmp_path / name / "README.md").read_text().partition("## Training")[2] for name in ("whole", "resumed")]
    assert cards[0].partition("<!--")[0] == cards[1].partition("<!--")[0]


def test_a_job_that_is_started_again_and_again_starts_from_the_model_once(tmp_path, model):
    run = trainer(tmp_path / "run", init_from=model, resume_from_checkpoint="latest")
    assert run.step == 0
    assert run.run.initial.weights is not None


def test_the_card_says_what_was_fine_tuned(tmp_path, model, monkeypatch):
    trainer(tmp_path / "local", init_from=model, max_train_steps=1).train()
    card = (tmp_path / "local" / "README.md").read_text()
    assert "- started from: the weights of model (SHA-256 " in card
    assert "base_model:" not in card
    assert str(tmp_path) not in card
    load = DDPMPipeline.from_pretrained
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", lambda name, **how: load(model, **how))
    trainer(tmp_path / "hub", init_from="org/model", max_train_steps=1).train()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "base_model: org/model\n" in card
    assert "the weights of org/model (" in card


def test_an_optimal_variance_belongs_to_the_weights_it_was_measured_for(tmp_path, capsys):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(50, beta_end=0.2, variance_type="optimal"))
    pipe.scheduler.set_prediction_error([0.1] * 50)
    pipe.save_pretrained(tmp_path / "model")
    run = trainer(tmp_path / "run", init_from=str(tmp_path / "model"))
    assert run.publisher.pipeline(run._ema_state_dict()).scheduler.config["variance_type"] == "fixed_small"
    assert "was measured for its weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "scheduler", "options", "words"),
    [
        ({}, {}, {"prediction_type": "sample"}, "predicts epsilon, not sample"),
        ({}, {}, {"variance_type": "learned", "loss": "vlb"}, "use learned_range"),
        ({}, {"variance_type": "learned_range"}, {}, "conv_out has 1 channels, and 2 belong to 1 image channels"),
        ({"out_channels": 2}, {"variance_type": "learned_range"}, {}, "loss='simple' does not go with"),
        (
            {"out_channels": 2},
            {"variance_type": "learned_range"},
            {"variance_type": "learned", "loss": "vlb"},
            ", not learned",
        ),
        ({"rows": ROWS}, {}, {}, r"is class-conditional \(0..2\); add class_conditional"),
        ({"class_embed_type": "timestep"}, {}, CLASSES, "class_embed_type 'timestep'"),
        ({"sample_size": None}, {}, {}, "has no sample_size; add resolution"),
        ({}, {}, {"resolution": 9}, "cannot be halved"),
        ({}, {}, {"resume_from_checkpoint": "checkpoint-2"}, "no checkpoint 'checkpoint-2'; .* has none"),
    ],
)
def test_what_contradicts_the_model_is_refused(tmp_path, network, scheduler, options, words):
    model = save_model(tmp_path / "model", scheduler, **network)
    with pytest.raises(UserError, match=words):
        trainer(tmp_path / "run", init_from=model, **options)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_read_are_a_sentence(tmp_path, model, capsys):
    config = Path(model) / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [16, 16]}))
    (tmp_path / "empty").mkdir()
    for name, words in (
        (model, "expected shape"),
        (tmp_path / "empty", "holds no pipeline"),
        ("org/none", "there is no"),
    ):
        flags = ["--init_from", str(name), "--output_dir", str(tmp_path / "run")]
        assert main(["train", "--preset", "digits", *flags]) == 2
        said = capsys.readouterr().err
        assert f"cannot load --init_from {name}: " in said
        assert words in said
        assert said.count("\n") == 1


def test_weights_that_do_not_fit_are_all_named(tmp_path, model):
    run = trainer(tmp_path / "run", init_from=model)
    initial = run.run.initial
    initial.weights["extra"] = initial.weights.pop("conv_in.bias")
    initial.weights["conv_out.bias"] = torch.zeros(3)
    words = "conv_out.bias (3,) for (1,); extra (16,) for none; conv_in.bias none for (16,)"
    with pytest.raises(UserError, match=re.escape(words)):
        initialization.initialize(run.unet, initial)


def test_a_resumed_run_cannot_start_from_elsewhere(tmp_path, model):
    other = save_model(tmp_path / "other", seed=1)
    trainer(tmp_path / "run", init_from=model).train()
    with pytest.raises(UserError, match=r"started with init_from .*model, not with .*other; leave out"):
        trainer(tmp_path / "run", init_from=other, resume_from_checkpoint="latest")
    fresh = {key: value for key, value in QUICK.items() if key != "preset"}
    Trainer(TrainingConfig(preset="digits", output_dir=str(tmp_path / "fresh"), **fresh)).train()
    for which in ("latest", "checkpoint-4"):
        with pytest.raises(UserError, match=r"started with no init_from.* leave out init_from"):
            trainer(tmp_path / "fresh", init_from=model, resume_from_checkpoint=which)


def test_reproductions_start_from_nothing(tmp_path, model, capsys):
    flags = ["--preset", "digits", "--init_from", model, "--output_dir", str(tmp_path / "run")]
    assert main(["reproduce", *flags]) == 2
    assert "leave out --init_from" in capsys.readouterr().err
