"""`ddpm-hf ema`: models of other EMA lengths from a run's snapshots, the sweep, what is refused."""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from programs import run_ranks
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, Trainer, TrainingConfig, cli
from ddpm_hf.hub.files import facts_of_model

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from test_trainer import QUICK, small_preset  # noqa: F401  (the fixture, which is used by itself)


@pytest.fixture(scope="module")
def run(small_preset, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("ema") / "run"
    Trainer(TrainingConfig(**{**QUICK, "max_train_steps": 10, "output_dir": str(folder)})).train()
    return folder


def ema(*arguments: object) -> int:
    return cli.main(["ema", *map(str, arguments)])


def test_one_length_is_a_pipeline_that_stock_opens(run, tmp_path, capsys):
    assert ema(run, "--sigma_rel", "0.1", "--output", tmp_path / "model") == 0
    assert "sigma_rel 0.1 after update 10, predicted error 0.01%" in capsys.readouterr().out
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    tracked = load_file(run / "checkpoint-10" / "posthoc_ema.safetensors")
    for name, weight in stock.unet.state_dict().items():
        assert torch.allclose(weight, tracked[f"0.1/{name}"], rtol=1e-3, atol=1e-6), name
    assert stock.scheduler.config == diffusers.DDPMPipeline.from_pretrained(run).scheduler.config
    card = (tmp_path / "model" / "README.md").read_text()
    assert "EMA weights: power function of relative width sigma_rel 0.1, ending after update 10" in card
    assert "trained on **digits**" in card
    assert not list(tmp_path.glob("*/.*partial"))


def test_under_torchrun_one_process_writes(run, tmp_path):
    command = ["-m", "ddpm_hf.cli", "ema", str(run), "--sigma_rel", "0.05,0.1", "--output", str(tmp_path / "models")]
    first, second = run_ranks(command, command)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.count("wrote ") == 2
    assert second.stdout == ""
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["sigma_rel-0.05", "sigma_rel-0.1"]
    again = run_ranks(command, command)
    assert [end.returncode for end in again] == [2, 2]
    assert all("holds something else" in end.stderr for end in again)


@pytest.mark.parametrize("which", ["run", "checkpoint-10", "raw", "stopped"])
def test_a_model_made_of_a_run_tells_of_its_training(run, tmp_path, which):
    """As `scale_epsilon` and `optimal_variance` write them."""
    model = run / "checkpoint-10" if which == "checkpoint-10" else run
    if which == "stopped":
        shutil.copytree(run, model := tmp_path / "run", ignore=shutil.ignore_patterns("unet", "*.json", "*.md"))
        shutil.copytree(run / "checkpoint-10", model / "checkpoint-10", dirs_exist_ok=True)
    facts = facts_of_model(str(model), "made", "raw" if which == "raw" else "ema")
    assert (facts.name, facts.dataset, facts.base_model) == ("made", "digits", None)
    assert facts.recipe["updates"] == "10 of 16 images, seed 0"
    assert ("not these" in facts.recipe["EMA weights"]) is (which == "raw")


@pytest.mark.parametrize(("model", "base"), [("digits", None), ("org/name", "org/name"), ("/no/folder", None)])
def test_a_base_model_is_one_of_the_hub(model, base):
    assert facts_of_model(model, "made").base_model == base


def test_several_lengths_are_several_folders_and_differ(run, tmp_path):
    assert ema(run, "--sigma_rel", "0.05,0.12", "--step", "10", "--output", tmp_path / "models") == 0
    weights = [
        DDPMPipeline.from_pretrained(tmp_path / "models" / f"sigma_rel-{length}").unet.conv_in.weight
        for length in (0.05, 0.12)
    ]
    assert not torch.equal(*weights)


def test_a_run_that_was_stopped_again_is_described_and_measured_as_it_is_now(run, tmp_path):
    shutil.copytree(run, again := tmp_path / "run")
    more = {"max_train_steps": 12, "output_dir": str(again), "resume_from_checkpoint": "latest"}
    Trainer(TrainingConfig(**{**QUICK, **more})).train()
    shutil.copytree(run / "unet", again / "unet", dirs_exist_ok=True)  # as if it had not ended: an older model,
    (again / "README.md").unlink()  # or none
    what = ["--metrics", "nll", "--dataset", "digits", "--num_images", 4, "--num_evaluations", 4]
    assert ema(again, "--sweep", "--sigma_rel", "0.1", *what) == 0
    checkpoint, out = again / "checkpoint-12", tmp_path / "own.json"
    assert cli.main(["evaluate", "--model", str(checkpoint), *map(str, what), "--output", str(out)]) == 0
    own = json.loads((again / "ema_sweep" / "sweep.json").read_text())["values"]["the run's own EMA"]
    assert own["bits_per_dim"]["value"] == json.loads(out.read_text())["values"]["bits_per_dim"]["value"]
    assert ema(again, "--sigma_rel", "0.1", "--output", tmp_path / "model") == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "updates: 12 of 16 images" in card
    assert "EMA weights: power function of relative width sigma_rel 0.1, ending after update 12" in card


def test_a_sweep_measures_every_length_and_the_run_s_own_ema(run, capsys):
    images = ["--dataset", "digits", "--num_samples", 8, "--num_inference_steps", 2, "--features", "pixels"]
    assert ema(run, "--sweep", "--sigma_rel", "0.05,0.1", "--metrics", "nll,fid", "--num_images", 2, *images) == 0
    folder = run / "ema_sweep"
    assert {path.name for path in folder.iterdir()} == {
        *("sweep.md", "sweep.json", "sweep.png", "sigma_rel-0.05", "sigma_rel-0.1", "own"),
    }
    content = json.loads((folder / "sweep.json").read_text())
    assert list(content["values"]) == ["0.05", "0.1", "the run's own EMA"]
    assert {"bits_per_dim_2_steps", "fd_pixels_train_uint8"} <= set(content["best"])
    for name, best in content["best"].items():
        assert content["values"][best][name]["value"] == min(v[name]["value"] for v in content["values"].values())
    said = capsys.readouterr().out
    assert (folder / "sweep.md").read_text() in said
    assert "best by bits_per_dim_2_steps: " in said
    report = json.loads((folder / "sigma_rel-0.05" / "report.json").read_text())
    assert report["model"]["name"].endswith("sigma_rel-0.05")
    assert report["values"]["bits_per_dim_2_steps"] == content["values"]["0.05"]["bits_per_dim_2_steps"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RUN"),
        (["{tmp}", "--sigma_rel", "0.1", "--output", "{tmp}/x"], "no snapshots for post-hoc EMA"),
        (["{run}", "--sigma_rel", "0.1"], "--output"),
        (["{run}", "--output", "{tmp}/x"], "--sigma_rel 0.05,0.1"),
        (["{run}", "--sigma_rel", "a", "--output", "{tmp}/x"], "numbers such as 0.05,0.1, got 'a'"),
        (["{run}", "--sigma_rel", "0.5", "--output", "{tmp}/x"], "at most 0.2887"),
        (["{run}", "--sigma_rel", "0.01", "--output", "{tmp}/x"], "possible with at most 10%: 0.0"),
        (["{run}", "--sigma_rel", "0.1", "--step", "11", "--output", "{tmp}/x"], "up to 10"),
        (["{run}", "--sigma_rel", "0.1", "--output", "{run}"], "holds something else"),
        (["{run}", "--sweep", "--output", "{tmp}/x"], "leave out --output"),
        (["{run}", "--sweep", "--metrics", "fud"], "'fud'"),
        (["{run}", "--sigma_rel", "0.1", "--output", "{tmp}/x", "--metrics", "fid"], "--metrics goes with --sweep"),
        (["{run}", "--sweep", "--model", "{run}"], "the model is RUN"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, capsys, arguments, words):
    assert ema(*(word.format(run=run, tmp=tmp_path) for word in arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert not list(tmp_path.iterdir())
    assert not (run / "ema_sweep" / "model").exists()
