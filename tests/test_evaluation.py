"""Reports."""

import math

import pytest
import torch

from ddpm_hf import EvaluationReport, bits_per_dim
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
