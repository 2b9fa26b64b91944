"""`benchmarks/cifar10_run.py` and its parts of weights: the whole command, small and on the CPU."""

import json
import subprocess
import sys

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


def test_a_mistake_is_one_sentence_before_the_training(benchmark, data, tmp_path, capsys):
    flags = ["--data", str(data), "--output", str(tmp_path / "run"), *SMALL]
    assert benchmark.main([*flags, "--samples", "10"]) == 2
    assert "error: sw needs at least 20 samples, got --num_samples 10" in capsys.readouterr().err
    assert benchmark.main([*flags, "--features", "inceptoin"]) == 2
    assert "unknown --features 'inceptoin'" in capsys.readouterr().err
    assert benchmark.main([*flags, "--learning_rat", "1"]) == 2
    assert "unknown flag --learning_rat (did you mean '--learning_rate'?)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "training_config.yaml").exists()


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
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"part-001\.bin is damaged"):
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
