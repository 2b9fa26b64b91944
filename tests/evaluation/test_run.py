"""From a model and images to a report: the likelihood, its parts, resuming, models that cannot be evaluated."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_small_unet
from diffusers import DDIMScheduler
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, EvaluationReport, bits_per_dim
from ddpm_hf.data.datasets import ImageDataset, load_digits
from ddpm_hf.data.tensors import to_model_range
from ddpm_hf.evaluation import likelihoods as likelihood_evaluation
from ddpm_hf.evaluation import run as evaluation
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.run import evaluate_likelihood, first_images, parse_metrics


def test_full_and_stratified_agree_and_the_report_reads_back(tmp_path, small_unet):
    small_pipeline = DDPMPipeline(small_unet, DDPMScheduler(num_train_timesteps=200, variance_type="fixed_large"))
    data = first_images(load_digits("validation"), 6)
    full = evaluate_likelihood(small_pipeline, data, "validation", EvaluationOptions())
    few = evaluate_likelihood(small_pipeline, data, "validation", EvaluationOptions(num_evaluations=200))
    direct = bits_per_dim(small_pipeline.unet, small_pipeline.scheduler, to_model_range(data.images))
    value = full.values["bits_per_dim"]
    assert math.isclose(value["value"], direct.total_bpd.mean().item(), rel_tol=1e-6)
    estimate = few.values["bits_per_dim"]
    assert abs(estimate["value"] - value["value"]) < 5 * estimate["sampling_standard_error"]
    few.save(tmp_path / "report.json")
    assert EvaluationReport.load(tmp_path / "report.json") == few


def test_images_that_do_not_fit(small_pipeline):
    wrong = ImageDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, "colour")
    with pytest.raises(ValueError, match=r"'colour' are \(3, 8, 8\).*\(1, 8, 8\)"):
        evaluate_likelihood(small_pipeline, wrong, "all", EvaluationOptions())
    empty = ImageDataset(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), None, "none")
    with pytest.raises(ValueError, match="no images"):
        evaluate_likelihood(small_pipeline, empty, "all", EvaluationOptions())


@pytest.mark.parametrize(
    ("metrics", "options", "words"),
    [
        (["fdi"], {}, "knows .* got 'fdi' .did you mean 'fid'"),  # and not the likelihood instead
        ([], {}, "names no metric"),
        ("nll", {"num_images": -1}, "num_images must be at least 1, got -1"),
        ("fid", {"num_sets": 0}, "num_sets must be at least 1, got 0"),
        ("fid", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("nll", {"likelihood_splits": ["test"]}, "no images of the split 'test'; there are validation"),
    ],
)
def test_what_python_callers_get_wrong(small_pipeline, metrics, options, words):
    sets = {"validation": first_images(load_digits("validation"), 30)}
    with pytest.raises(ValueError, match=words):
        evaluation.evaluate(small_pipeline, sets, metrics, features="pixels", **options)


def test_metrics_and_folders_may_be_texts(small_pipeline, tmp_path):
    sets = {"validation": first_images(load_digits("validation"), 2)}
    folders = {"output": f"{tmp_path}/a", "cache_dir": f"{tmp_path}/b"}
    evaluation.evaluate(small_pipeline, sets, "nll", num_evaluations=2, **folders)
    assert list(EvaluationReport.load(folders["output"]).values) == ["bits_per_dim"]


def test_images_of_another_range_are_refused(small_pipeline):
    sets = {"train": ImageDataset(torch.rand(4, 1, 8, 8), None, "mine")}
    with pytest.raises(ValueError, match=r"images of 'mine' are torch\.float32; give pixel values from 0 to 255"):
        evaluation.evaluate(small_pipeline, sets, ["fid"], features="pixels")


def test_a_likelihood_takes_nothing_from_the_sampler(small_pipeline):
    sets = {"validation": first_images(load_digits("validation"), 2)}
    few = EvaluationOptions(num_evaluations=4)
    expected = evaluation.evaluate(small_pipeline, sets, ["nll"], few).values
    # Three steps in DDIM's spacing would not start from noise; nothing is sampled.
    found = evaluation.evaluate(small_pipeline, sets, ["nll"], few, sampler="ddim", num_inference_steps=3).values
    assert found == expected


def test_classes_are_matched_by_name():
    unet = make_small_unet(num_class_embeds=3, _class_names=["cats", "dogs", "owls"])
    pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
    images = load_digits("validation").images[:4]
    by_name = ImageDataset(images, torch.tensor([0, 1, 1, 0]), "folders", ["dogs", "owls"])
    by_number = ImageDataset(images, torch.tensor([1, 2, 2, 1]), "folders", ["cats", "dogs", "owls"])
    few = EvaluationOptions(num_evaluations=4)
    values = [evaluate_likelihood(pipe, data, "all", few).values for data in (by_name, by_number)]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match="no class 'zebras'"):
        evaluate_likelihood(pipe, ImageDataset(images, by_name.labels, "x", ["dogs", "zebras"]), "all", few)


def test_full_sum_gives_rate_distortion_and_table_4(tmp_path):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=20, variance_type="fixed_large"))
    data = first_images(load_digits("validation"), 5)
    options = EvaluationOptions(output=tmp_path, batch_size=2)
    report = evaluate_likelihood(pipe, data, "validation", options, rate_distortion=True)
    x_0 = to_model_range(data.images)
    direct = bits_per_dim(pipe.unet, pipe.scheduler, x_0)
    terms, mse, prior = direct.terms_bpd.double().numpy(), direct.mse.double().numpy(), direct.prior_bpd.numpy()
    values = {name: value["value"] for name, value in report.values.items()}
    assert values["prior_bpd"] == pytest.approx(prior.mean(), rel=1e-5)
    assert values["distortion_bpd"] == pytest.approx(terms[:, 0].mean(), rel=1e-5)
    assert values["rate_bpd"] == pytest.approx(terms[:, 1:].sum(1).mean() + prior.mean(), rel=1e-5)
    assert values["rate_bpd"] + values["distortion_bpd"] == pytest.approx(values["bits_per_dim"], rel=1e-6)
    assert values["rmse"] == pytest.approx(127.5 * np.sqrt(mse[:, 0].mean()), rel=1e-5)
    (table,) = report.tables.values()
    assert [row["reverse steps"] for row in table] == list(range(20, 0, -2))
    for row in table:  # of k reverse steps: x_(T-k) is known, so all later terms are paid
        t = 20 - row["reverse steps"]
        assert row["rate (bits/dim)"] == pytest.approx(prior.mean() + terms[:, t + 1 :].mean(0).sum(), rel=1e-4)
        assert row["distortion (RMSE)"] == pytest.approx(127.5 * np.sqrt(mse[:, t].mean()), rel=1e-5)
    with (tmp_path / "rate_distortion_validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert float(rows[0]["rmse_grey_levels"]) == pytest.approx(values["rmse"], rel=1e-5)
    assert Image.open(tmp_path / "rate_distortion_validation.png").size[0] > 1000
    with pytest.raises(ValueError, match="rate_distortion needs every term"):
        evaluate_likelihood(pipe, data, "validation", EvaluationOptions(num_evaluations=4), rate_distortion=True)


def test_an_interrupted_likelihood_resumes(tmp_path, monkeypatch):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=10))
    data = first_images(load_digits("validation"), 6)
    options = EvaluationOptions(num_evaluations=4, batch_size=2)
    whole = evaluate_likelihood(pipe, data, "validation", options)
    calls = []
    original = likelihood_evaluation.stratified_bits_per_dim

    def interrupted(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(list(kwargs["image_ids"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(likelihood_evaluation, "stratified_bits_per_dim", interrupted)
    options = dataclasses.replace(options, work_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate_likelihood(pipe, data, "validation", options)
    assert calls == [[0, 1], [2, 3]]
    calls.clear()
    resumed = evaluate_likelihood(pipe, data, "validation", options)
    assert calls == [[4, 5]]
    assert resumed.values == whole.values
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # another seed is another evaluation
        evaluate_likelihood(pipe, data, "validation", dataclasses.replace(options, seed=1))
    assert calls == [[0, 1], [2, 3]]


def test_several_sets_are_so_many_evaluations(tmp_path):
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=10))
    sets = {split: first_images(load_digits(split), 40) for split in ("train", "validation")}
    metrics = ["fid", "kid", "prc", "dc", "mmd", "auth", "nn"]
    options = EvaluationOptions(features="pixels", num_samples=20, num_inference_steps=2, cache_dir=tmp_path / "cache")
    alone = [evaluation.evaluate(pipe, sets, metrics, options, seed=seed) for seed in (7, 27, 47)]
    report = evaluation.evaluate(pipe, sets, metrics, options, seed=7, num_sets=3, output=tmp_path / "out")
    assert report.values.keys() == alone[0].values.keys()
    assert len({one.values["fd_pixels_train_uint8"]["value"] for one in alone}) == 3
    for name, entry in report.values.items():
        values = [one.values[name]["value"] for one in alone]
        if name.startswith(("nearest", "memorisation")):  # of the first set, as the pictures are
            assert entry["value"] == values[0]
            continue
        assert report.settings[name]["sets"] == values
        assert entry["value"] == pytest.approx(np.mean(values), rel=1e-12)
        assert entry["spread"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        assert entry["standard_error"] == pytest.approx(entry["spread"] / math.sqrt(3), rel=1e-12)
        assert (entry["lowest"], entry["highest"]) == (min(values), max(values))
    assert report.settings["sampling"]["seeds"] == "7-66"
    low, _, high = sorted(report.settings["mmd_pixels_train_uint8"]["sets"])
    page = (tmp_path / "out" / "report.md").read_text()
    assert "mean of 3 sets: " in page
    assert f"; {low:.5g} to {high:.5g} |" in page
    assert EvaluationReport.load(tmp_path / "out").values == report.values


@pytest.mark.parametrize("main", [True, False])
def test_only_the_first_process_has_bars(tmp_path, monkeypatch, main):
    shown, showing = [], evaluation.showing_progress
    monkeypatch.setattr(evaluation, "showing_progress", lambda show: (shown.append(show), showing(show))[1])
    monkeypatch.setattr(evaluation, "processes", lambda: SimpleNamespace(is_main_process=main))
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=10))
    options = EvaluationOptions(features="pixels", num_samples=4, num_inference_steps=1, cache_dir=tmp_path)
    data = {"train": first_images(load_digits("train"), 4)}
    evaluation.evaluate(pipe, data, ["kid"], options, progress=True)
    assert shown == [main]


def test_metrics_by_name():
    assert parse_metrics("nll, fid,nll") == ["nll", "fid"]
    for text, words in (("fdi", "'fdi' .did you mean 'fid'"), ("", "names no metric")):
        with pytest.raises(ValueError, match=words):
            parse_metrics(text)


def test_a_model_may_have_any_name(small_pipeline):
    data = {"validation": first_images(load_digits("validation"), 2)}
    report = evaluation.evaluate(small_pipeline, data, ["nll"], num_evaluations=2, model_name="DDPM, run 3")
    assert report.model["name"] == "DDPM, run 3"
    assert "revision" not in report.model


def test_a_model_without_a_likelihood():
    """One that was saved with DDIM has betas, and no posterior."""
    pipe = DDPMPipeline(make_small_unet(), DDIMScheduler(num_train_timesteps=10))
    with pytest.raises(ValueError, match="saved with a DDIMScheduler, which has no likelihood"):
        evaluate_likelihood(pipe, first_images(load_digits("validation"), 2), "validation", EvaluationOptions())
