"""Claims about a model that was really trained: the digits model of the demo, ddpm_hf/models/digits."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.svm import SVC

from ddpm_hf import DDPMPipeline, bits_per_dim, stratified_bits_per_dim
from ddpm_hf.data.datasets import load_digits
from ddpm_hf.data.tensors import to_model_range
from ddpm_hf.sampling.generation import generate, with_sampler


@pytest.fixture(scope="module")
def pipe() -> DDPMPipeline:
    loaded = DDPMPipeline.from_pretrained(DIGITS_MODEL)
    loaded.unet.eval()
    return loaded


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return to_model_range(load_digits("validation").images)


def test_the_model_comes_with_the_package_under_its_name(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    included = DDPMPipeline.from_pretrained("digits")
    assert {n: w.tolist() for n, w in included.unet.named_parameters()} == {
        n: w.tolist() for n, w in pipe.unet.named_parameters()
    }
    (tmp_path / "digits").mkdir()  # somebody's own folder comes first
    with pytest.raises(OSError, match="'digits' holds no pipeline"):
        DDPMPipeline.from_pretrained("digits")


def test_stratified_bits_per_dim_agrees_with_the_full_sum_at_k_50(pipe, held_out):
    x_0 = held_out[:8]
    full = bits_per_dim(pipe.unet, pipe.scheduler, x_0, seed=1).total_bpd.double().mean().item()
    errors = []
    for seed in range(8):
        few = stratified_bits_per_dim(pipe.unet, pipe.scheduler, x_0, num_evaluations=50, seed=100 + seed)
        errors.append((few.mean - full) / few.sampling_standard_error)
    errors = np.array(errors)
    # In units of its own error bar: no draw far outside, and their mean within what eight draws allow.
    assert np.abs(errors).max() < 4
    assert abs(errors.mean()) < 3 / math.sqrt(len(errors))
    assert errors.std() > 0.2  # the error bars are not so wide that nothing could fall outside


def test_held_out_likelihood_is_what_was_reported(pipe, held_out):
    estimate = stratified_bits_per_dim(pipe.unet, pipe.scheduler, held_out[:64], num_evaluations=50)
    assert 4.2 < estimate.mean < 4.7  # docs/digits.md: 4.44; an untrained network has 7.5, uniform pixel values 8


def test_samples_are_digits(pipe):
    """The bounds of docs/digits.md, on fewer samples."""
    real, labels = sklearn_digits(return_X_y=True)
    images = torch.cat([x for _, x in generate(with_sampler(pipe, "ddim"), range(256), num_inference_steps=50)])
    samples = images[:, 0].numpy().reshape(256, 64) * (16 / 255)
    with warnings.catch_warnings():
        # Newer scikit-learn will drop it; the bound was set with it.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*probability.*")
        probabilities = SVC(probability=True, random_state=0).fit(real, labels).predict_proba(samples)
    assert probabilities.max(1).mean() > 0.85
    assert len(np.unique(probabilities.argmax(1))) == 10

    def distance(a, b):
        cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)

    order = np.random.default_rng(0).permutation(len(real))
    between_real = distance(real[order[:256]], real[order[256:512]])
    assert distance(samples, real[order[:256]]) < 1.5 * between_real
    noise = np.random.default_rng(0).uniform(0, 16, (256, 64))
    assert distance(noise, real[order[:256]]) > 10 * between_real  # and the measure tells noise from digits
