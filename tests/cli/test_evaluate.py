"""`ddpm-hf evaluate` as people use it: one command, one report; interrupted, repeated, in two processes, misused."""

import json

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, make_small_unet
from inception import save_random_inception
from PIL import Image
from programs import run_ranks

from ddpm_hf import DDPMPipeline, DDPMScheduler, EvaluationReport, cli
from ddpm_hf.data.datasets import load_digits
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.utils.visualize import image_grid

MODEL = ["--model", str(DIGITS_MODEL)]
LEADING = ["--timestep_spacing", "leading"]
SMALL = ["--sampler", "ddim", "--num_inference_steps", "5", "--num_samples", "24", "--features", "pixels"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))


def evaluate(*flags: str) -> int:
    return cli.main(["evaluate", *MODEL, *flags])


def values_of(report: EvaluationReport) -> dict[str, float]:
    return {name: value["value"] for name, value in report.values.items()}


def test_one_command_one_report(tmp_path, capsys):
    out = tmp_path / "evaluation"
    metrics = ["--metrics", "nll,fid,kid,prc,nn", "--num_images", "4", "--num_evaluations", "4"]
    assert evaluate("--dataset", "digits", *metrics, *SMALL, "--output", str(out)) == 0
    printed = capsys.readouterr().out
    report = EvaluationReport.load(out)
    expected = {f"fd_pixels_{split}_{kind}" for split in ("train", "validation") for kind in ("uint8", "float")}
    for name in ("kd", "precision", "recall"):
        expected |= {f"{name}_pixels_{split}_uint8" for split in ("train", "validation")}
    assert set(report.values) == {"bits_per_dim", "nearest_distance_pixels", "memorisation_pixels", *expected}
    assert all(np.isfinite([value["value"], value["standard_error"]]).all() for value in report.values.values())
    assert all(report.settings[name]["estimator"] for name in report.values)
    assert (report.num_images, report.split) == (4, "validation")
    assert report.settings["sampling"]["seeds"] == "0-23"
    assert report.settings["fd_pixels_train_uint8"]["num_real"] == 1501
    assert len(report.model["weights_sha256"]) == 64
    assert any("24 samples are biased" in warning for warning in report.warnings)
    assert any("too few to know the covariance of 64" in warning for warning in report.warnings)
    for picture in report.pictures:
        assert Image.open(out / picture).size[0] > 100
    assert {"samples.png", "neighbours_pixels.png"} <= set(report.pictures)
    page = (out / "report.md").read_text()
    assert "fd_pixels_train_uint8" in page
    assert "bits/dim on 4 images" in printed
    assert "fd_pixels_train_uint8: " in printed
    assert cli.main(["evaluate", "--compare", str(out), str(out / "report.json")]) == 0
    assert "+0" in capsys.readouterr().out


def test_an_interrupted_evaluation_resumes_and_a_repeated_one_draws_nothing(tmp_path, capsys, monkeypatch):
    flags = ["--dataset", "digits", "--metrics", "fid", *SMALL, "--batch_size", "10"]
    assert evaluate(*flags, "--output", str(tmp_path / "whole")) == 0
    drawn: list[int] = []
    original = DDPMPipeline.__call__

    def spy(self, *args, **kwargs):
        if len(drawn) == 10 and not limit["lifted"]:
            raise KeyboardInterrupt
        drawn.extend(kwargs["seeds"])
        return original(self, *args, **kwargs)

    limit = {"lifted": False}
    monkeypatch.setattr(DDPMPipeline, "__call__", spy)
    capsys.readouterr()
    assert evaluate(*flags, "--output", str(tmp_path / "cut")) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert drawn == list(range(10))
    assert not (tmp_path / "cut" / "report.json").exists()
    limit["lifted"] = True
    assert evaluate(*flags, "--output", str(tmp_path / "cut")) == 0
    assert drawn == list(range(24))
    whole, cut = (EvaluationReport.load(tmp_path / name) for name in ("whole", "cut"))
    assert list(whole.values) == list(cut.values)
    assert values_of(cut) == pytest.approx(values_of(whole), rel=1e-9)
    # With other metrics the samples are those that are there.
    assert evaluate(*flags, "--metrics", "prc", "--output", str(tmp_path / "cut")) == 0
    assert drawn == list(range(24))


def test_batch_size_and_processes_change_nothing(tmp_path):
    flags = ["--dataset", "digits", "--metrics", "nll,fid,kid,prc,nn", "--num_images", "5", "--num_evaluations", "4"]
    flags += SMALL
    assert evaluate(*flags, "--output", str(tmp_path / "one")) == 0
    assert evaluate(*flags, "--output", str(tmp_path / "small"), "--batch_size", "7") == 0
    command = ["-m", "ddpm_hf.cli", "evaluate", *MODEL, *flags, "--output", str(tmp_path / "two")]
    environment = {"DDPM_HF_CACHE": str(tmp_path / "other_cache")}
    ends = run_ranks(command, command, environment=environment)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-3000:]
    assert "".join(end.stdout for end in ends).count("bits/dim on 5 images") == 1
    one, small, two = (EvaluationReport.load(tmp_path / name) for name in ("one", "small", "two"))
    for other in (small, two):
        assert values_of(other) == pytest.approx(values_of(one), rel=1e-6, abs=1e-9)
    assert one.pictures == two.pictures


def test_inception_and_a_vision_model(tmp_path, capsys):
    save_random_inception(tmp_path / "inception.pth")
    for split, count in (("train", 3), ("validation", 2)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / split / f"{i}.png")
    flags = ["--train_data_dir", str(tmp_path / "images" / "train"), "--metrics", "fid,is", "--num_samples", "10"]
    flags += ["--num_inference_steps", "5", "--sampler", "ddim", "--features", "inception,pixels"]
    flags += ["--inception_weights", str(tmp_path / "inception.pth"), "--output", str(tmp_path / "report.json")]
    assert evaluate(*flags) == 0
    report = EvaluationReport.load(tmp_path / "report.json")
    kinds = ("float", "uint8")
    names = {f"fid_inception_train_{kind}" for kind in kinds} | {f"fd_pixels_train_{kind}" for kind in kinds}
    assert set(report.values) == names | {f"is_inception_{kind}" for kind in kinds}
    assert set(report.settings["features"]) == {"inception", "pixels"}
    assert all(value["value"] >= 1 for name, value in report.values.items() if name.startswith("is_"))
    assert json.loads((tmp_path / "report.json").read_text())["values"]["fid_inception_train_float"]["value"] > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["inception.pth", "report.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "digits", "--metrics", "fid"], ["Inception weights are not at", "--inception_weights FILE"]),
        (["--dataset", "digits", "--metrics", "fid", "--features", "pixel"], ["unknown --features 'pixel'"]),
        (["--dataset", "digits", "--metrics", "nll,fdi"], ["'fdi'", "'fid'"]),
        (["--dataset", "digits", "--metrics", "is", "--features", "pixels"], ["needs --features inception"]),
        (["--dataset", "digits", "--metrics", "fid", *SMALL, "--num_samples", "1"], ["fid needs at least 2", "1"]),
        (["--dataset", "digits", "--metrics", "prc", *SMALL, "--num_samples", "3"], ["prc needs at least 4", "3"]),
        (["--dataset", "digits", "--metrics", "nn", *SMALL, "--split", "validation"], ["nn needs", "train"]),
        (["--dataset", "digits", "--metrics", "fid", *SMALL, "--num_samples", "0"], ["num_samples"]),
        (["--dataset", "digits", "--metrics", "fid", *SMALL, "--num_inference_steps", "1001"], ["1001"]),
        (["--dataset", "digits", "--metrics", "fid", *SMALL, "--sampler", "eulr"], ["'eulr'"]),
        (
            ["--dataset", "digits", "--metrics", "fid", *SMALL, "--num_inference_steps", "3", *LEADING],
            ["from noise at t=666", "--timestep_spacing trailing"],
        ),
        (["--dataset", "digits", "--metrics", "rate_distortion", "--num_evaluations", "4"], ["every term"]),
        (["--train_data_dir", "{tmp}/empty"], ["neither a folder that holds images"]),
        (["--train_data_dir", "{tmp}/one", "--metrics", "fid", *SMALL], ["at least 2 real images", "has 1"]),
        (["--train_data_dir", "{tmp}/one", "--split", "validation"], ["--validation_split"]),
        (["--dataset", "digits", "--output", "{tmp}/one/0.png"], ["is a file"]),
        (["--dataset", "digits", "--metrics", "fid", *SMALL, "--seed", "-1"], ["--seed: must not be negative", "-1"]),
        (["--dataset", "digits", "--metrics", "fid", "--features", ","], ["--features names nothing"]),
        (["--dataset", "digits", "--num_images", "1", "--output", "/proc/x"], ["cannot write to --output /proc/x"]),
        (["--dataset", "digits", "--num_images", "1", "--output", "/proc/x/a.json"], ["cannot write to --output"]),
        (["--dataset", "digits", "--metrics", "fid", *SMALL, "--cache_dir", "/proc/x"], ["write to --cache_dir"]),
        (["--compare", "{tmp}/a.json", "{tmp}/b.json"], ["leave out --model"]),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "one" / "0.png")
    assert evaluate(*[flag.replace("{tmp}", str(tmp_path)) for flag in flags]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == ""
    assert len(lines) == 1, err
    assert err.strip().splitlines()[-1] == lines[0]
    assert all(word in lines[0] for word in words), lines[0]


def test_the_likelihood_needs_no_cache(capsys):
    flags = ["--dataset", "digits", "--num_images", "1", "--num_evaluations", "2", "--cache_dir", "/proc/x"]
    assert evaluate(*flags) == 0
    assert "bits/dim on 1 images" in capsys.readouterr().out


def test_steps_that_the_likelihood_does_not_take_are_named(capsys):
    few = ["--num_images", "1", "--num_evaluations", "2", "--num_inference_steps", "3"]
    assert evaluate("--dataset", "digits", "--metrics", "nll", *few) == 0
    assert "all 1000 steps: --num_inference_steps is for samples here" in capsys.readouterr().out


def test_the_model_is_asked_for(capsys):
    assert cli.main(["evaluate", "--dataset", "digits"]) == 2
    assert "--model" in capsys.readouterr().err


def test_threads_of_this_process_are_left_alone():
    before = torch.get_num_threads()
    assert evaluate("--dataset", "digits", "--num_images", "1", "--num_evaluations", "2") == 0
    assert torch.get_num_threads() == before


def test_other_settings_are_drawn_anew_and_recorded(tmp_path, monkeypatch):
    """Noise of ddim, and a network in bf16: the grid is what the pipeline draws with them; nothing is reused."""
    calls: list[int] = []
    original = DDPMPipeline.__call__

    def spy(self, *args, **kwargs):
        calls.extend(kwargs["seeds"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DDPMPipeline, "__call__", spy)
    out = tmp_path / "evaluation"
    flags = ["--dataset", "digits", "--metrics", "fid,nll", "--num_images", "4", "--num_evaluations", "4", *SMALL]
    found = {}
    for eta, dtype in (("0", "float32"), ("1", "float32"), ("1", "float32"), ("1", "bfloat16")):
        before = len(calls)
        assert evaluate(*flags, "--eta", eta, "--dtype", dtype, "--output", str(out)) == 0
        assert len(calls) - before == (0 if (eta, dtype) in found else 24)
        report = found[eta, dtype] = EvaluationReport.load(out)
        assert (report.settings["sampling"]["eta"], report.settings["sampling"]["dtype"]) == (float(eta), dtype)
        assert report.settings["bits_per_dim"]["dtype"] == dtype
        pipe = with_sampler(DDPMPipeline.from_pretrained(DIGITS_MODEL, dtype=getattr(torch, dtype)), "ddim")
        drawn = original(pipe, seeds=range(24), num_inference_steps=5, eta=float(eta), output_type="pt").images
        expected = np.asarray(image_grid((drawn * 255).round().byte()))
        assert np.array_equal(np.asarray(Image.open(out / "samples.png")), expected)
    full, half = (values_of(found["1", dtype]) for dtype in ("float32", "bfloat16"))
    assert half["bits_per_dim"] != full["bits_per_dim"]
    assert half["bits_per_dim"] == pytest.approx(full["bits_per_dim"], rel=0.02)  # eight bits of mantissa


def test_guidance_is_recorded_and_used(tmp_path, monkeypatch):
    names = load_digits("train").class_names
    unet = make_small_unet(num_class_embeds=11, _class_names=names, _null_class=10)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    scales = []
    original = DDPMPipeline.__call__

    def spy(self, *args, **kwargs):
        scales.extend([kwargs["guidance_scale"]] * len(kwargs["seeds"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DDPMPipeline, "__call__", spy)
    flags = ["--model", str(tmp_path / "model"), "--dataset", "digits", "--metrics", "fid", *SMALL]
    for scale in ("1", "3"):
        assert cli.main(["evaluate", *flags, "--guidance_scale", scale, "--output", str(tmp_path / "out")]) == 0
        report = EvaluationReport.load(tmp_path / "out")
        assert report.settings["sampling"]["guidance_scale"] == float(scale)
    assert scales == [1.0] * 24 + [3.0] * 24


def test_images_are_read_as_in_training(tmp_path, capsys):
    """What a model was trained on with reading flags can be evaluated with the same ones."""
    digits = load_digits("validation").images[:6].permute(0, 2, 3, 1).numpy()
    for name, array in (("plain", digits), ("scaled", digits.astype(np.float32) / 255 * 7 - 3)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "images.npy", array)
    common = ["--num_evaluations", "4", "--output"]
    assert evaluate("--train_data_dir", str(tmp_path / "plain"), *common, str(tmp_path / "a.json")) == 0
    scaled = ["--train_data_dir", str(tmp_path / "scaled")]
    assert evaluate(*scaled, "--value_range", "-3", "4", *common, str(tmp_path / "b.json")) == 0
    reports = [EvaluationReport.load(tmp_path / name) for name in ("a.json", "b.json")]
    assert values_of(reports[0]) == values_of(reports[1])
    capsys.readouterr()
    assert evaluate(*scaled, *common, str(tmp_path / "c.json")) == 2
    assert "--value_range" in capsys.readouterr().err


def test_the_value_of_optimize_is_checked_first(tmp_path, capsys):
    for command in (
        ["evaluate", "--model", "nowhere", "--dataset", "digits"],
        ["sample", "--model", "nowhere", "--output", str(tmp_path / "x.png")],
        ["sample", "--model", "nowhere", "--output", str(tmp_path / "x.png"), "--figure", "progressive"],
    ):
        assert cli.main([*command, "--optimize", "fast"]) == 2
        assert "--optimize: must be one of auto, yes, no, compile, got 'fast'" in capsys.readouterr().err


def test_a_figure_of_an_optimized_network(tmp_path, capsys):
    for word in ("no", "yes"):
        flags = ["--figure", "progressive", "--num_inference_steps", "5", "--seeds", "0-1", "--optimize", word]
        assert cli.main(["sample", *MODEL, *flags, "--output", str(tmp_path / f"{word}.png")]) == 0
    assert "network: fp32" in capsys.readouterr().out
    no, yes = (np.asarray(Image.open(tmp_path / f"{word}.png")).astype(int) for word in ("no", "yes"))
    assert abs(no - yes).max() <= 1


def test_comparing_takes_two_reports(tmp_path, capsys):
    a, b = (str(tmp_path / name) for name in ("a.json", "b.json"))
    for names, words in (([a], "at least two reports"), ([a, b, a], "each once"), ([a, b], "no report")):
        assert cli.main(["evaluate", "--compare", *names]) == 2
        assert words in capsys.readouterr().err


def test_flags_of_a_figures_images_need_a_figure(tmp_path, capsys):
    assert cli.main(["sample", *MODEL, "--background", "black", "--output", str(tmp_path / "x.png")]) == 2
    assert "--background goes with --figure interpolation" in capsys.readouterr().err


def test_a_model_with_a_weight_that_is_nan_gives_one_sentence_and_nothing_else(tmp_path, capsys):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=10))
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    out = str(tmp_path / "out")
    for command in (
        ["sample", "--output", out],
        ["sample", "--output", f"{out}.png"],
        ["sample", "--output", f"{out}.png", "--figure", "progressive"],
        ["evaluate", "--dataset", "digits", "--num_images", "2", "--num_evaluations", "2", "--output", out],
        ["optimal_variance", "--dataset", "digits", "--num_images", "2"],
    ):
        assert cli.main([*command, "--model", str(tmp_path / "model")]) == 2
        printed, error = capsys.readouterr()
        assert "wrote" not in printed
        assert "the network's weights conv_in.weight hold NaN or infinity" in error.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before


def test_one_image_has_bits_and_no_error(tmp_path, capsys):
    DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "model")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--dataset", "digits", "--num_images", "1"]
    assert cli.main([*command, "--output", str(tmp_path / "report.json")]) == 0
    assert "nan" not in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["values"]["bits_per_dim"]["standard_error"] is None
