"""Stopped runs: what they leave, `ddpm-hf publish`, signals around the end; the oracles are runs that finished."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline as StockDDPMPipeline
from hub.server import HubServer
from programs import ROOT, run_program, run_ranks
from safetensors.torch import load_file
from test_trainer import QUICK, small_preset  # noqa: F401  (the fixture, which is used by itself)

from ddpm_hf import DDPMPipeline, EvaluationReport, Trainer, TrainingConfig, cli
from ddpm_hf.hub.files import published_files
from ddpm_hf.training.publishing import Publisher
from ddpm_hf.utils import processes

RUN = {**QUICK, "lr_scheduler": "constant"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def trainer(output_dir, **settings) -> Trainer:
    return Trainer(TrainingConfig(**{**RUN, "output_dir": str(output_dir), **settings}))


def stop_in(run: Trainer, update: int, monkeypatch, number=signal.SIGTERM) -> Trainer:
    """Let the signal come in the middle of an update."""
    make = run._update

    def interrupted(step):
        if step + 1 == update:
            os.kill(os.getpid(), number)
        return make(step)

    monkeypatch.setattr(run, "_update", interrupted)
    return run


@pytest.fixture(scope="module")
def whole(small_preset, tmp_path_factory) -> Path:  # noqa: F811
    """A run that finished."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def stopped(small_preset, tmp_path_factory) -> Path:  # noqa: F811
    """A run of 4 updates that was stopped after its third."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert stop_in(trainer(folder, max_train_steps=400), 3, patch).train() is None
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in published_files(folder)}


def ddpm_hf(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_a_stopped_run_samples_from_the_ema_of_its_raw_weights(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", checkpointing_steps=1, max_train_steps=100)
    average = {name: value.detach().double().clone() for name, value in run.unet.state_dict().items()}
    stop_in(run, 5, monkeypatch).train()
    for n in range(1, 6):
        raw = load_file(tmp_path / "run" / f"checkpoint-{n}" / "model.safetensors")
        decay = min(run.recipe.ema_decay, (1 + n) / (10 + n))  # the digits preset warms up, as diffusers does
        average = {name: decay * average[name] + (1 - decay) * raw[name].double() for name in average}
    for name, value in DDPMPipeline.from_pretrained(tmp_path / "run").unet.state_dict().items():
        assert torch.allclose(value.double(), average[name], rtol=1e-5, atol=1e-7), name
    for name, value in DDPMPipeline.from_pretrained(tmp_path / "run", weights="raw").unet.state_dict().items():
        assert torch.equal(value, raw[name])


def test_the_commands_that_a_stopped_run_names_work(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "with space"
    stop_in(trainer(folder, max_train_steps=400), 3, monkeypatch, signal.SIGINT).train()
    said = capsys.readouterr().out
    assert f"stopped after update 3 of 400, saved in {folder}/checkpoint-3" in said
    named = dict(re.findall(r"^  (\w+): +ddpm-hf (.*)$", said, re.MULTILINE))
    assert list(named) == ["resume", "sample", "publish"]
    assert ddpm_hf(*shlex.split(named["sample"]), "--num_inference_steps", 2, "--seeds", "0-1") == 0
    assert f"EMA weights of {folder}/checkpoint-3, after 3 updates" in capsys.readouterr().out
    assert len(list((folder / "samples-3").rglob("*.png"))) == 2
    assert ddpm_hf(*shlex.split(named["publish"])) == 0
    assert "| 4/4 [" in capsys.readouterr().err  # the grid
    assert "3 of 16 images, seed 0; 400 updates were planned" in (folder / "README.md").read_text()
    assert ddpm_hf(*shlex.split(named["resume"]), "--max_train_steps", 4) == 0
    assert (folder / "checkpoint-4").is_dir()


def test_published_is_what_a_run_that_ended_there_writes_and_resuming_ends_in_the_same_bits(tmp_path, stopped, whole):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    finished = trainer(tmp_path / "finished" / "run", max_train_steps=3)
    finished.train()
    assert ddpm_hf("publish", run, "--evaluate") == 0
    made, expected = content(run), content(finished.output_dir)
    assert made.keys() == expected.keys() >= {"samples.png", "evaluation.json", WEIGHTS}
    for name in made.keys() - {"README.md", "evaluation.json"}:  # which say 400 updates, and seconds
        assert made[name] == expected[name], name
    numbers = [EvaluationReport.load(folder / "evaluation.json").values for folder in (run, finished.output_dir)]
    assert numbers[0] == numbers[1]
    cards = [text["README.md"].decode().partition("<!-- generated")[0].splitlines() for text in (made, expected)]
    assert set(cards[0]) - set(cards[1]) == {"- updates: 3 of 16 images, seed 0; 400 updates were planned"}
    assert StockDDPMPipeline.from_pretrained(run).unet.config.sample_size == 8

    assert ddpm_hf("publish", run) == 0  # once more, without numbers: nothing is lost
    assert content(run) == made
    trainer(run, resume_from_checkpoint="latest").train()
    for name in ("model", "ema", "optimizer"):
        one, two = (load_file(folder / "checkpoint-6" / f"{name}.safetensors") for folder in (run, whole))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_checkpoint_goes_into_another_folder_and_nothing_is_overwritten(tmp_path, whole, capsys):
    card = tmp_path / "out" / "README.md"
    assert ddpm_hf("publish", whole / "checkpoint-3", "--output", card.parent, "--num_sample_images", 0) == 0
    assert {path.name for path in card.parent.iterdir()} == {"model_index.json", "README.md", "unet", "scheduler"}
    ema = load_file(whole / "checkpoint-3" / "ema.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in load_file(card.parent / WEIGHTS).items())
    card.write_text("# My own words\n")
    assert ddpm_hf("publish", "--model", whole / "checkpoint-3", "--output", card.parent) == 0
    assert (card.parent / "samples.png").exists()
    assert card.read_text() == "# My own words\n"

    shutil.copytree(whole / "checkpoint-3", tmp_path / "copied")  # without the run's configuration
    alone = ["publish", tmp_path / "copied", "--output", tmp_path / "raw", "--weights", "raw"]
    assert ddpm_hf(*alone, "--num_sample_images", 1, "--ddpm_num_inference_steps", 2) == 0
    assert "EMA weights: not these: the raw weights" in (tmp_path / "raw" / "README.md").read_text()
    before = content(card.parent)
    capsys.readouterr()
    for words, sentence in [
        ([whole / "checkpoint-3"], "is a checkpoint: say where its model goes with --output FOLDER"),
        ([whole / "checkpoint-6", "--output", card.parent], "holds something else; name a new folder"),
        ([tmp_path / "copied", "--output", tmp_path / "b", "--evaluate"], "--evaluate needs the images of the run"),
        ([tmp_path / "nowhere"], "there is no folder"),
        ([whole / "unet"], "no checkpoint of a training run"),
        ([], "give the folder of the run or model: RUN, or --model RUN"),
    ]:
        assert ddpm_hf("publish", *words) == 2
        assert re.fullmatch(rf"error: .*{re.escape(sentence)}.*\n", capsys.readouterr().err)
    assert content(card.parent) == before


def test_the_run_is_found_beside_the_current_folder_and_a_grid_that_is_asked_for_is_drawn(
    tmp_path, stopped, monkeypatch
):
    shutil.copytree(stopped, run := tmp_path / "run")
    config = run / "training_config.yaml"
    config.write_text(config.read_text() + "license: mit\n")
    monkeypatch.chdir(run / "checkpoint-3")
    assert ddpm_hf("publish", ".", "--output", tmp_path / "out") == 0
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    first = (tmp_path / "out" / "samples.png").read_bytes()
    assert ddpm_hf("publish", ".", "--output", tmp_path / "out", "--num_sample_images", 1) == 0
    second = (tmp_path / "out" / "samples.png").read_bytes()
    assert second != first
    assert ddpm_hf("publish", ".", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "samples.png").read_bytes() == second


def test_publishing_waits_for_no_run_that_writes_there(tmp_path, stopped, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    with processes.only_run_in(tmp_path / "run"):
        assert ddpm_hf("publish", tmp_path / "run") == 2
    assert "another run is writing into" in capsys.readouterr().err


def test_commands_take_stopped_runs_and_checkpoints(tmp_path, stopped, capsys):
    sampled = ["--num_inference_steps", 2, "--seeds", "0-1"]
    assert ddpm_hf("sample", "--model", stopped, "--output", tmp_path / "a.png", *sampled) == 0
    assert ddpm_hf("sample", "--model", stopped / "checkpoint-3", "--output", tmp_path / "b.png", *sampled) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert ddpm_hf("sample", "--model", stopped, "--weights", "raw", "--output", tmp_path / "c.png", *sampled) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    figure = ["--figure", "progressive", "--seeds", "0", "--output", tmp_path / "d.png", "--num_inference_steps", 8]
    assert ddpm_hf("sample", "--model", stopped, *figure) == 0
    assert ddpm_hf("space", stopped, "--output", tmp_path / "space") == 0
    assert ddpm_hf("convert", "--from", "diffusers", "--checkpoint", stopped, "--output", tmp_path / "converted") == 0
    measured = ["--dataset", "digits", "--num_images", 1]
    assert ddpm_hf("evaluate", "--model", stopped, *measured, "--num_evaluations", 2) == 0
    variance = ["optimal_variance", "--model", stopped, *measured]
    capsys.readouterr()
    assert ddpm_hf(*variance) == 2
    assert "is no published model here whose scheduler can be rewritten; give --output" in capsys.readouterr().err
    assert ddpm_hf(*variance, "--output", tmp_path / "with variance") == 0
    ema = load_file(stopped / "checkpoint-3" / "ema.safetensors")
    for folder in (tmp_path / "space" / "model", tmp_path / "converted", tmp_path / "with variance"):
        unet = StockDDPMPipeline.from_pretrained(folder).unet if folder.name != "with variance" else None
        weights = load_file(folder / WEIGHTS) if unet is None else unet.state_dict()
        assert all(torch.equal(weights[name], ema[name]) for name in ema)
    assert "3 of 16 images, seed 0; 400 updates were planned" in (tmp_path / "space/model/README.md").read_text()


def test_a_stopped_run_is_pushed_with_a_card_that_says_so(tmp_path, stopped):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    with HubServer(tmp_path / "hub") as hub:
        for folder, name, more in [(stopped, "run", []), (stopped / "checkpoint-3", "raw", ["--weights", "raw"])]:
            command = ["-m", "ddpm_hf.cli", "push", folder, "--repo_id", f"org/{name}", *more]
            done = run_program(*command, environment=hub.environment(tmp_path / "home", "hf_test_token"))
            assert done.returncode == 0, done.stderr
            assert f"weights of {stopped}/checkpoint-3, after 3 updates" in done.stdout
            card = hub.read("models", f"org/{name}", "README.md").decode()
            assert "3 of 16 images, seed 0; 400 updates were planned" in card
            assert f'from_pretrained("org/{name}")' in card
            (tmp_path / name).write_bytes(hub.read("models", f"org/{name}", WEIGHTS))
    for name, file in (("run", "ema"), ("raw", "model")):
        weights = load_file(stopped / "checkpoint-3" / f"{file}.safetensors")
        assert all(torch.equal(value, weights[key]) for key, value in load_file(tmp_path / name).items())
    after = {
        path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file() and path.name != ".hub.json"
    }
    assert after == before


@pytest.mark.parametrize("moment", ["the last update", "the last checkpoint", "writing the model", "the samples"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_near_the_end_leaves_the_model_and_resuming_the_rest(
    tmp_path, monkeypatch, capsys, whole, moment, number
):
    run, sent = trainer(tmp_path / "run"), []

    def interrupted(make):
        def call(*arguments):
            if run.step == 6 and not sent:  # a second one, more than a second later, is another request
                sent.append(number)
                os.kill(os.getpid(), number)
            return make(*arguments)

        return call

    if moment == "the last update":
        stop_in(run, 6, monkeypatch, number)
    elif moment == "the last checkpoint":
        monkeypatch.setattr(run, "_save", interrupted(run._save))
    else:
        name = "_write_pipeline" if moment == "writing the model" else "sample_grid"
        monkeypatch.setattr(run.publisher, name, interrupted(getattr(run.publisher, name)))
    assert run.train() is None
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    said = capsys.readouterr().out
    assert f"the model is in {tmp_path}/run; missing: samples.png and evaluation.json, made by" in said
    assert "No sample grid yet" in (tmp_path / "run" / "README.md").read_text()
    command = re.search(r"^  ddpm-hf (train .*)$", said, re.MULTILINE)[1]
    assert ddpm_hf(*shlex.split(command)) == 0
    made, expected = content(tmp_path / "run"), content(whole)
    assert made.keys() == expected.keys()
    assert all(made[name] == expected[name] for name in made.keys() - {"README.md", "evaluation.json"})


def test_two_processes_that_are_stopped_in_the_last_update_write_the_model(tmp_path):
    command = [str(ROOT / "tests" / "driver_stop.py"), str(tmp_path / "run")]
    ends = run_ranks(command, command)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-2000:]
    assert "stopped after update 3, the last" in ends[0].stdout
    assert f"torchrun --nproc_per_node 2 -m ddpm_hf.cli train --config {tmp_path}/run/" in ends[0].stdout
    assert not (tmp_path / "run" / "samples.png").exists()
    ema = load_file(tmp_path / "run" / "checkpoint-3" / "ema.safetensors")
    weights = load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(weights[name], ema[name]) for name in ema)


def test_two_processes_publish_what_one_does_and_refuse_together(tmp_path, stopped):
    command = ["-m", "ddpm_hf.cli", "publish", str(stopped / "checkpoint-3"), "--output"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").write_text("x")
    assert [end.returncode for end in run_ranks(*[[*command, str(tmp_path / "two")]] * 2)] == [0, 0]
    ends = run_ranks(*[[*command, str(tmp_path / "used")]] * 2)
    assert [end.returncode for end in ends] == [2, 2]
    assert all("holds something else; name a new folder" in end.stderr for end in ends)
    assert ddpm_hf(*command[2:], tmp_path / "one") == 0
    for name in ("samples.png", WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_resume_command_says_what_the_launcher_chose(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    assert run._resume_command().endswith("--resume_from_checkpoint latest")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert run._resume_command().endswith("--resume_from_checkpoint latest --mixed_precision no")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert run._resume_command() == "the command that started it, with --resume_from_checkpoint latest"


def test_a_push_that_waits_is_named_as_missing(tmp_path):
    publisher = Publisher(TrainingConfig(**RUN, output_dir=str(tmp_path)), {}, None)
    publisher.pushes = object()
    assert publisher.missing() == ["samples.png", "its push to the Hub"]


def test_no_scheduler_is_written_beside_a_checkpoint(stopped, tmp_path, capsys):
    shutil.copytree(stopped, run := tmp_path / "run")
    before = sorted(run.rglob("*"))
    for model in (run, run / "checkpoint-3"):
        what = ["--model", str(model), "--dataset", "digits", "--num_inference_steps", "3"]
        assert cli.main(["best_timesteps", *what]) == 2
        assert "no published model here whose scheduler can be rewritten; ddpm-hf publish" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
