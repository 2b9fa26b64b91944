"""Reports."""

import math

import pytest
import torch
from conftest import make_small_unet

from ddpm_hf import DDPMPipeline, DDPMScheduler, EvaluationReport, bits_per_dim
from ddpm_hf.data import ImageDataset, load_digits, to_model_range
from ddpm_hf.evaluation import evaluate_likelihood, first_images


def test_full_and_stratified_agree_and_the_report_reads_back(tmp_path, small_pipeline):
    data = first_images(load_digits("validation"), 6)
    full = evaluate_likelihood(small_pipeline, data, "validation", num_evaluations=None)
    few = evaluate_likelihood(small_pipeline, data, "validation", num_evaluations=200)
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
        evaluate_likelihood(small_pipeline, wrong, "all")
    empty = ImageDataset(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), None, "none")
    with pytest.raises(ValueError, match="no images"):
        evaluate_likelihood(small_pipeline, empty, "all")


def test_classes_are_matched_by_name():
    unet = make_small_unet(num_class_embeds=3, _class_names=["cats", "dogs", "owls"])
    pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
    images = load_digits("validation").images[:4]
    by_name = ImageDataset(images, torch.tensor([0, 1, 1, 0]), "folders", ["dogs", "owls"])
    by_number = ImageDataset(images, torch.tensor([1, 2, 2, 1]), "folders", ["cats", "dogs", "owls"])
    values = [evaluate_likelihood(pipe, data, "all", num_evaluations=4).values for data in (by_name, by_number)]
    assert values[0] == values[1]
    with pytest.raises(ValueError, match="no class 'zebras'"):
        evaluate_likelihood(pipe, ImageDataset(images, by_name.labels, "x", ["dogs", "zebras"]), "all")
