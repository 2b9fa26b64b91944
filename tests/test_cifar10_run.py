"""`benchmarks/cifar10_run.py` and its parts of weights: the whole command, small and on the CPU."""

import json
import os
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline


@pytest.fixture
def benchmark(repository_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repository_root / "benchmarks"))
    import cifar10_run

    yield cifar10_run
    for name in ("cifar10_run", "weight_parts"):
        sys.modules.pop(name)


@pytest.fixture
def data(tmp_path):
    pixels = np.random.RandomState(0)
    for split, count in (("train", 40), ("test", 20)):
        np.savez(tmp_path / f"{split}.npz", images=pixels.randint(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    return tmp_path / "train.npz"


SMALL = ["--minutes", "30", "--channels", "32", "32", "--samples", "24", "--steps", "2"]
SMALL += ["--ancestral", "20", "--ancestral_steps", "3"]
SMALL += ["--images", "4", "--features", "pixels", "--metrics", "kid,sw", "--batch_size", "8"]
SMALL += ["--max_train_steps", "4", "--total_batch_size", "4", "--validation_steps", "2", "--num_sample_images", "2"]
SMALL += ["--ddpm_num_inference_steps", "2", "--validation_split", "0.1", "--eval_num_images", "2"]
SMALL += ["--eval_num_evaluations", "2"]


def test_the_whole_command(benchmark, data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert benchmark.main(["--data", str(data), "--output", str(folder), *SMALL]) == 0
    report = json.loads((folder / "run.json").read_text())
    assert report["training"]["updates"] == 4
    assert [entry["update"] for entry in report["curve"]] == [2, 4]
    names = {f"{what}_pixels_{split}_uint8" for what in ("kd", "sw") for split in ("train", "test")}
    for chain, sampler, count in (("ddim", "DDIMScheduler", 24), ("ancestral", "DDPMScheduler", 20)):
        assert set(report[chain]["values"]) == names
        assert report[chain]["settings"]["sampling"]["sampler"] == sampler
        assert report[chain]["settings"]["sampling"]["num_samples"] == count
    assert report["bits_per_dim"]["split"] == "test"
    assert report["bits_per_dim"]["num_images"] == 4
    assert Image.open(folder / "samples.png").size > (100, 60)
    assert (folder / "curve.png").exists()
    assert "ddim: {" in capsys.readouterr().out
    assert str(tmp_path) not in (folder / "README.md").read_text()

    # The parts, put together by the script that lies beside them, are the EMA weights in bf16, bit for bit.
    parts = folder / "parts"
    command = [sys.executable, str(parts / "weight_parts.py"), "unpack", str(parts), str(tmp_path / "again")]
    subprocess.run(command, check=True)
    trained, again = (load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (folder, tmp_path / "again"))
    assert trained.keys() == again.keys()
    assert all(torch.equal(again[name], value.to(torch.bfloat16).float()) for name, value in trained.items())
    pipe = DDPMPipeline.from_pretrained(tmp_path / "again")
    assert dict(pipe.scheduler.config) == dict(DDPMPipeline.from_pretrained(folder).scheduler.config)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples", "10"], "sw needs at least 20 samples, got --samples 10"),
        (["--ancestral", "10"], "sw needs at least 20 samples, got --ancestral 10"),
        (["--steps", "2000"], "--steps must be between 1 and the 1000 steps of the chain, got 2000"),
        (["--features", "inceptoin"], "unknown --features 'inceptoin'"),
        (["--metrics", "fidd"], "got 'fidd' (did you mean 'fid'?)"),
        (["--metrics", "sw,nll"], "leave out nll: bits/dim is always measured"),
        (["--learning_rat", "1"], "unknown flag --learning_rat (did you mean '--learning_rate'?)"),
        (["--channels", "30"], "--channels: must be multiples of 32, got '30'"),
        (["--layers", "0"], "--layers: must be positive, got '0'"),
        (["--images", "0"], "--images: must be positive, got '0'"),
        (["--batch_size", "0"], "--batch_size: must be positive, got '0'"),
        (["--minutes", "nan"], "--minutes: must be positive, got 'nan'"),
        (["--total_minutes", "30"], "--total_minutes 30 leaves no time to measure after --minutes 30; give more"),
        (["--test", "nowhere.npz"], "--test 'nowhere.npz' is no file; give a .npz that holds `images`"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_training(benchmark, data, tmp_path, capsys, flags, sentence):
    assert benchmark.main(["--data", str(data), "--output", str(tmp_path / "run"), *SMALL, *flags]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert sentence in said
    assert not (tmp_path / "run" / "training_config.yaml").exists()
    assert not (tmp_path / "run" / "start").exists()


def test_images_that_do_not_fit_are_one_sentence(benchmark, data, tmp_path, capsys):
    flags = ["--data", str(data), "--output", str(tmp_path / "run"), *SMALL]
    for height, width, sentence in ((16, 16, "are 16x16, and those of --data 8x8"), (8, 4, "are 8x4, and those")):
        np.savez(tmp_path / "test.npz", images=np.zeros((20, height, width, 3), dtype=np.uint8))
        assert benchmark.main(flags) == 2
        assert sentence in capsys.readouterr().err
    np.savez(tmp_path / "train.npz", images=np.zeros((20, 8, 4, 3), dtype=np.uint8))
    assert benchmark.main(flags) == 2
    assert "holds images of 8x4; this command takes square ones" in capsys.readouterr().err
    np.savez(tmp_path / "train.npz", images=np.zeros((1, 8, 8, 3)))
    assert benchmark.main(flags) == 2
    assert "--value_range 0 1" in capsys.readouterr().err  # which this command takes, too
    assert not (tmp_path / "run").exists()


def test_a_stopped_command_continues_and_loses_nothing(benchmark, data, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    flags = ["--data", str(data), "--output", str(folder), *SMALL]
    resume = [*flags, "--resume_from_checkpoint", "latest"]
    update = benchmark.Trainer._update

    def interrupted(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.Trainer, "_update", interrupted)
        assert benchmark.main(flags) == 130
    assert "the same command with --resume_from_checkpoint latest continues" in capsys.readouterr().err
    assert (folder / "checkpoint-2").exists()
    start = (folder / "start/unet/diffusion_pytorch_model.safetensors").read_bytes()

    # another run in the same folder is refused, also one of another network, and leaves all that is there
    for more in ([], ["--channels", "64"]):
        assert benchmark.main([*flags, *more]) == 2
        assert "already holds a run; resume it with" in capsys.readouterr().err
    assert (folder / "start/unet/diffusion_pytorch_model.safetensors").read_bytes() == start

    def stopped(*arguments, num_samples=None, **options):
        if num_samples == 20:  # the ancestral samples, after two evaluations
            raise KeyboardInterrupt
        return evaluate(*arguments, num_samples=num_samples, **options)

    evaluate = benchmark.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "evaluate", stopped)
        assert benchmark.main(resume) == 130
    before = json.loads((folder / "run.json").read_text())
    assert before["training"]["updates"] == 4
    assert {"ddim", "bits_per_dim"} < set(before)
    with monkeypatch.context() as patch:  # and a third time, stopped before anything was measured again
        patch.setattr(benchmark, "evaluate", Mock(side_effect=KeyboardInterrupt))
        assert benchmark.main(resume) == 130
    again = json.loads((folder / "run.json").read_text())
    assert (again["ddim"], again["bits_per_dim"]) == (before["ddim"], before["bits_per_dim"])


def test_minutes_that_are_too_few_are_called_as_they_were_given(benchmark, data, tmp_path, capsys):
    flags = ["--data", str(data), "--output", str(tmp_path / "run"), *SMALL, "--minutes", "0.0001"]
    assert benchmark.main(flags) == 2
    assert "error: --minutes 0.0001 is too short: " in capsys.readouterr().err


def test_a_command_that_was_stopped_before_the_training_continues(benchmark, data, tmp_path, monkeypatch):
    flags = ["--data", str(data), "--output", str(tmp_path / "run"), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "Measurements", Mock(side_effect=KeyboardInterrupt))
        assert benchmark.main(flags) == 130
    trainer = benchmark.Trainer

    def opened(config):
        trainer(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "Trainer", opened)
    assert benchmark.main([*flags, "--resume_from_checkpoint", "latest"]) == 130  # 2: its first model is not there


def test_parts_are_small_and_a_damaged_one_is_noticed(benchmark, small_pipeline, tmp_path, monkeypatch):
    import weight_parts

    small_pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(weight_parts, "VALUES", 10_000)
    total = weight_parts.pack(tmp_path / "model", tmp_path / "parts")
    files = sorted((tmp_path / "parts").glob("part-*.bin"))
    assert len(files) > 2
    assert total == sum(file.stat().st_size for file in files)
    assert all(file.stat().st_size <= 2 * 10_000 + 64 for file in files)
    # a part of random bits, which do not compress, is still below 16 MiB
    assert 2 * 8_000_000 * 1.001 < 16 * 2**20
    with pytest.raises(ValueError, match="holds files already; name another folder"):
        weight_parts.unpack(tmp_path / "parts", tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text("another pipeline's")
    with pytest.raises(ValueError, match="holds files already; name another folder"):
        weight_parts.unpack(tmp_path / "parts", tmp_path / "other")
    assert (tmp_path / "other" / "model_index.json").read_text() == "another pipeline's"
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"part-001\.bin is damaged"):
        weight_parts.unpack(tmp_path / "parts", tmp_path / "again")
    (tmp_path / "parts" / "parts.json").write_text('{"files": [')
    with pytest.raises(ValueError, match=r"parts\.json is damaged"):
        weight_parts.unpack(tmp_path / "parts", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_fails_or_has_no_time_loses_nothing_before_it(benchmark, tmp_path):
    report = benchmark.Report(tmp_path / "run.json", None)
    with report.part("first") as due:
        assert due
        report.add("first", 1)
    with report.part("second"):
        raise RuntimeError("out of something")
    report.end = 0.0
    with report.part("third") as due:
        assert not due
    values = json.loads((tmp_path / "run.json").read_text())
    assert values["first"] == 1
    assert values["second"] == "failed: RuntimeError: out of something"
    assert values["third"] == "left out: no time was left"
    assert set(values["seconds"]) == {"first", "second"}
