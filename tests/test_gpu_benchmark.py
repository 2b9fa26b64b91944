"""`benchmarks/gpu.py --rehearse`: the path that is measured on a GPU, small and on the CPU."""

import json
import sys

import pytest


@pytest.fixture
def benchmark(repository_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repository_root / "benchmarks"))
    import gpu

    yield gpu
    sys.modules.pop("gpu")


def test_the_rehearsal_runs_every_part(benchmark, tmp_path, capsys):
    assert benchmark.main(["--rehearse", "--output", str(tmp_path), "--minutes", "60"]) == 0
    values = json.loads((tmp_path / "gpu.json").read_text())
    assert not [name for name in values if "failed" in name or "left out" in name]
    assert values["largest difference from the official network's output"] < 1e-4
    same = [value for name, value in values.items() if name.endswith("in the same bits")]
    assert same == [True] * 4
    assert values["samples: largest difference between batches in pixel values"] < 0.1
    assert values["ours: images/s"] > 0
    assert values["sampling, ours: image steps/s"] > 0
    assert "rehearsal" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out_and_what_fails_loses_nothing(benchmark, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(benchmark, "correctness", fail)
    assert benchmark.main(["--rehearse", "--output", str(tmp_path), "--minutes", "0.5"]) == 0
    values = json.loads((tmp_path / "gpu.json").read_text())
    assert values["correctness: failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "training: left out" in values
    assert values["bf16 matrix product, TFLOP/s"] > 0


def test_without_a_gpu_it_says_so(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert benchmark.main(["--output", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err
