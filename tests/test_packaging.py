"""The wheel: what is in it, and that it works in an environment of its own, away from the checkout."""

import email
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import ddpm_hf
from ddpm_hf import EvaluationReport, cli


def run(*command: object, cwd: Path) -> str:
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=plain)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(repository_root, tmp_path_factory) -> Path:
    """The folder of an sdist, and of a wheel that was made of that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, repository_root, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of a fresh environment: the wheel, and what it depends on from this one; no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    programs = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}))
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    # Afterwards, so that pip does not take this environment's own package for the one to install.
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_the_wheel_holds_the_package_and_nothing_else(built, repository_root):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"ddpm_hf-{ddpm_hf.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    sources = repository_root / "ddpm_hf"
    package = {
        f"ddpm_hf/{path.relative_to(sources).as_posix()}"
        for path in sources.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(info)} == package
    assert {"ddpm_hf/py.typed", "ddpm_hf/data/digits.safetensors", f"{info}/licenses/LICENSE"} <= names
    assert "ddpm_hf/models/digits/unet/diffusion_pytorch_model.safetensors" in names
    assert metadata["Version"] == ddpm_hf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"torch>=2.9", "pyyaml>=6.0.2"} <= set(metadata.get_all("Requires-Dist"))


def test_the_example_s_header_asks_for_this_package_on_the_same_pythons(repository_root):
    """PEP 723: what `uv run examples/train.py` installs; one file that somebody downloads, so without paths."""
    project = tomllib.loads((repository_root / "pyproject.toml").read_text())["project"]
    text = (repository_root / "examples" / "train.py").read_text()
    # the expression of the PEP
    (block,) = re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert block["type"] == "script"
    header = tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))
    assert header.keys() == {"requires-python", "dependencies"}
    assert header["requires-python"] == project["requires-python"]
    (needed,) = map(Requirement, header["dependencies"])
    assert needed.name == project["name"]
    assert needed.extras <= set(project["optional-dependencies"])
    assert needed.url is None


def test_the_version_stands_in_one_place(repository_root):
    files = [repository_root / "pyproject.toml", *repository_root.glob("ddpm_hf/**/*.py")]
    assert [path.name for path in files if f'"{ddpm_hf.__version__}"' in path.read_text()] == ["__init__.py"]
    for name, line in (("CITATION.cff", "version: {}"), ("docs/citing.md", "  version = {{{}}},")):  # for people
        assert line.format(ddpm_hf.__version__) in (repository_root / name).read_text().splitlines(), name


def test_the_sdist_holds_what_development_needs(built):
    (sdist,) = built.glob("*.tar.gz")
    top = f"ddpm_hf-{ddpm_hf.__version__}"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    wanted = "pyproject.toml LICENSE CITATION.cff SECURITY.md README.md CHANGELOG.md CONTRIBUTING.md Makefile "
    wanted += "constraints.txt docs/index.md "
    wanted += "examples/train.py examples/configs/digits.yaml tests/test_packaging.py tests/fixtures/README.md "
    assert set((wanted + "ddpm_hf/__init__.py ddpm_hf/data/digits.safetensors ddpm_hf/py.typed").split()) <= names
    assert not [name for name in names if name.startswith(("runs/", ".venv")) or "__pycache__" in name]


def test_a_tracker_that_is_missing_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ddpm_hf.training.tracking.get_available_trackers", list)
    assert cli.main(["train", "--preset", "digits", "--output_dir", str(tmp_path), "--report_to", "tensorboard"]) == 2
    assert "pip install 'ddpm-hf[train]' first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("torch_fidelity", "eval", "evaluate --model digits --dataset digits --metrics fid --output x"),
        ("matplotlib.figure", "eval", "evaluate --model digits --dataset digits --metrics rate_distortion --output x"),
    ],
)
def test_an_extra_that_is_missing_is_named_before_the_work(missing, extra, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err
    assert f"pip install 'ddpm-hf[{extra}]'" in said
    assert "eval/s" not in said  # no progress bar: nothing was computed


def test_a_space_without_gradio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ddpm_hf.hub.space_app", raising=False)
    with pytest.raises(SystemExit, match=re.escape("pip install 'ddpm-hf[space]'")):
        importlib.import_module("ddpm_hf.hub.space_app")


def test_the_demos_steps_work_outside_the_checkout(installed, tmp_path):
    """Train, sample and evaluate; the commands of one process, because importing takes longest."""
    assert run(installed / "ddpm-hf", "--version", cwd=tmp_path).strip() == ddpm_hf.__version__
    script = """
import sys, ddpm_hf
from importlib.metadata import version
from ddpm_hf import cli
steps = [
    "train --preset digits --output_dir run --max_train_steps 20 --lr_warmup_steps 5 --ddpm_num_inference_steps 10 "
    "--num_sample_images 4 --eval_num_images 4 --eval_num_evaluations 4 --sampler ddim",
    "sample --model run --seeds 0-3 --sampler ddim --num_inference_steps 10 --output samples.npz",
    "sample --model digits --seeds 0-3 --sampler unipc --num_inference_steps 5 --output included.png",
    "evaluate --model run --dataset digits --metrics nll,fid,nn --num_images 4 --num_evaluations 4 --num_samples 8 "
    "--sampler ddim --num_inference_steps 10 --features pixels --output evaluation",
]
print(ddpm_hf.__file__, version("ddpm-hf"), [cli.main(step.split()) for step in steps])
"""
    last = run(installed / "python", "-c", script, cwd=tmp_path).splitlines()[-1]
    file, version, codes = last.split(" ", 2)
    assert Path(file).is_relative_to(installed.parent)
    assert (version, codes) == (ddpm_hf.__version__, "[0, 0, 0, 0]")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 8, 8, 1)
    report = EvaluationReport.load(tmp_path / "evaluation")
    assert {"bits_per_dim", "fd_pixels_validation_float", "nearest_distance_pixels"} <= set(report.values)
    assert Image.open(tmp_path / "evaluation" / "samples.png").size[0] > 100
