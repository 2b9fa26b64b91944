"""Gaussians in closed form: against torch.distributions, Monte Carlo, scipy and 50-digit arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PIXEL_VALUES, decoder_log_likelihood, normal_cdf, tanh_cdf
from torch.distributions import Normal, kl_divergence

from ddpm_hf.diffusion import distributions
from ddpm_hf.diffusion.distributions import (
    approximate_normal_cdf,
    bound_term,
    discretized_gaussian_log_likelihood,
    mean_flat,
    nats_to_bits,
    normal_kl,
)

LEVELS = torch.from_numpy(PIXEL_VALUES)
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def gaussians(n: int = 200):
    """Means and log-variances of two sets of Gaussians, float64."""
    g = torch.Generator().manual_seed(0)
    mean_1, mean_2 = torch.randn(2, n, generator=g, dtype=torch.float64)
    log_variance_1, log_variance_2 = 4 * torch.rand(2, n, generator=g, dtype=torch.float64) - 3
    return mean_1, log_variance_1, mean_2, log_variance_2


def reference_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    return kl_divergence(Normal(mean_1, (log_variance_1 / 2).exp()), Normal(mean_2, (log_variance_2 / 2).exp()))


# ---------------------------------------------------------------------- KL


def test_normal_kl_equals_torch_distributions():
    torch.testing.assert_close(normal_kl(*gaussians()), reference_kl(*gaussians()), rtol=1e-12, atol=1e-14)


def test_normal_kl_the_wrong_way_round_fails():
    mean_1, log_variance_1, mean_2, log_variance_2 = gaussians()
    wrong = normal_kl(mean_2, log_variance_2, mean_1, log_variance_1)
    assert ((wrong - reference_kl(*gaussians())).abs() > 1e-3).float().mean() > 0.9


def test_normal_kl_agrees_with_monte_carlo():
    mean_1, log_variance_1, mean_2, log_variance_2 = (x[:20] for x in gaussians())
    p, q = Normal(mean_1, (log_variance_1 / 2).exp()), Normal(mean_2, (log_variance_2 / 2).exp())
    n = 100_000
    noise = torch.randn(n, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = p.mean + p.stddev * noise
    log_ratio = p.log_prob(x) - q.log_prob(x)
    z = (log_ratio.mean(0) - normal_kl(mean_1, log_variance_1, mean_2, log_variance_2)) / (log_ratio.std(0) / n**0.5)
    assert z.abs().max() < 4  # 20 normal deviates


def test_normal_kl_is_zero_for_equals_and_broadcasts():
    x = torch.randn(3, 1, 5)
    # Not "nearly": the likelihood of a good model at large t is a millionth of a bit, which rounding would cover.
    assert torch.equal(normal_kl(x, x, x, x), torch.zeros_like(x))
    assert normal_kl(x, torch.tensor(-1.0), torch.zeros(4, 1), torch.zeros(5)).shape == (3, 4, 5)


# ---------------------------------------------------------------------- Eq. 13


def test_the_approximate_cdf_is_the_official_one():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    torch.testing.assert_close(approximate_normal_cdf(x).numpy(), tanh_cdf(x.numpy()), rtol=1e-13, atol=1e-15)
    gap = np.abs(approximate_normal_cdf(x).numpy() - normal_cdf(x.numpy())).max()
    assert 1e-4 < gap < 2e-4  # what the docstring says of it


@pytest.mark.parametrize(("cdf", "tolerance"), [("tanh", 1e-9), ("exact", 1e-12)])
@QUICK
@given(mean=st.floats(-1.5, 1.5), log_scale=st.floats(-6, 2))
def test_eq_13_sums_to_one_over_the_pixel_values(cdf, tolerance, mean, log_scale):
    log_p = discretized_gaussian_log_likelihood(LEVELS, torch.tensor(mean), torch.tensor(log_scale), cdf=cdf)
    # The floor of 1e-12 under each probability of the official code may add up to 2.56e-10.
    assert abs(log_p.exp().sum().item() - 1) < tolerance


def test_eq_13_with_bins_of_the_wrong_width_does_not_sum_to_one(monkeypatch):
    """256 bins in [-1, 1] are 2/255 apart, not 2/256: the known mistake leaves gaps."""
    monkeypatch.setattr(distributions, "HALF_BIN", 1 / 256)
    for cdf in ("tanh", "exact"):
        log_p = discretized_gaussian_log_likelihood(LEVELS, torch.tensor(0.1), torch.tensor(-1.0), cdf=cdf)
        assert abs(log_p.exp().sum().item() - 1) > 1e-3


@pytest.mark.parametrize(("cdf", "reference"), [("tanh", tanh_cdf), ("exact", normal_cdf)])
def test_eq_13_equals_a_slow_integral(cdf, reference):
    means = torch.tensor([-1.1, -0.4, 0.0, 0.3, 1.0], dtype=torch.float64)[:, None, None]
    log_scales = torch.tensor([-5.0, -3.0, -1.0, 0.5], dtype=torch.float64)[:, None]
    ours = discretized_gaussian_log_likelihood(LEVELS, means, log_scales, cdf=cdf)
    slow = torch.from_numpy(decoder_log_likelihood(PIXEL_VALUES, means.numpy(), log_scales.numpy(), reference))
    likely = slow > -20  # below, the oracle's difference of two numbers near 1 has lost its digits
    assert likely.float().mean() > 0.5
    torch.testing.assert_close(ours[likely], slow[likely], rtol=1e-6, atol=1e-6)


def exact_log_probability(x: float, mean: float, scale: float) -> float:
    """log of Eq. 13 with 60 digits."""
    with mpmath.workdps(60):
        x, mean, scale, half = mpmath.mpf(x), mpmath.mpf(mean), mpmath.mpf(scale), mpmath.mpf(1) / 255
        upper, lower = (x - mean + half) / scale, (x - mean - half) / scale
        if x < -0.999:
            return float(mpmath.log(mpmath.ncdf(upper)))
        if x > 0.999:
            return float(mpmath.log(mpmath.ncdf(-lower)))
        if x > mean:  # by symmetry in the left tail, where nothing cancels
            upper, lower = -lower, -upper
        return float(mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_the_exact_cdf_keeps_its_digits_in_the_tails(dtype, tolerance):
    """Down to a probability of e^-30000, where the tanh approximation has long hit its floor."""
    worst = 0.0
    for level in (0, 1, 7, 100, 127, 128, 200, 254, 255):
        for mean in (-1.2, -0.5, 0.004, 0.8):
            for scale in (0.0074, 0.05, 0.4, 3.0):
                # All three rounded to the dtype first, so that the oracle computes with the same numbers.
                x = LEVELS[level].to(dtype)
                m, s = torch.tensor(mean, dtype=dtype), torch.tensor(math.log(scale), dtype=dtype)
                ours = discretized_gaussian_log_likelihood(x, m, s, cdf="exact").item()
                exact = exact_log_probability(x.item(), m.item(), math.exp(s.item()))
                worst = max(worst, abs(ours - exact) / max(abs(exact), 1e-3))
    assert worst < tolerance


@pytest.mark.parametrize("cdf", ["tanh", "exact"])
def test_eq_13_has_finite_values_and_gradients_everywhere(cdf):
    means = torch.linspace(-3, 3, 25)[:, None, None].requires_grad_()
    log_scales = torch.linspace(-8, 4, 13)[:, None].requires_grad_()
    log_p = discretized_gaussian_log_likelihood(LEVELS.float(), means, log_scales, cdf=cdf)
    log_p.sum().backward()
    for tensor in (log_p, means.grad, log_scales.grad):
        assert torch.isfinite(tensor).all()
    assert (log_p <= 0).all()


def test_an_unknown_cdf_is_refused():
    with pytest.raises(ValueError, match=r"'tanh'.*'exact'.*'erf'"):
        discretized_gaussian_log_likelihood(LEVELS, LEVELS, LEVELS, cdf="erf")


# ---------------------------------------------------------------------- one term of the bound


def test_bound_term_is_the_decoder_at_the_first_timestep_and_a_kl_elsewhere():
    g = torch.Generator().manual_seed(2)
    x_0 = LEVELS[torch.randint(0, 256, (3, 1, 4, 4), generator=g)]
    q_mean, p_mean = 0.1 * torch.randn(2, 3, 1, 4, 4, generator=g, dtype=torch.float64)
    p_mean = p_mean + x_0
    q_log_variance, p_log_variance = torch.full((3, 1, 1, 1), -4.0), torch.full((3, 1, 1, 1), -3.5)
    term = bound_term(x_0, torch.tensor([0, 1, 9]), q_mean, q_log_variance, p_mean, p_log_variance)
    kl = reference_kl(q_mean, q_log_variance, p_mean, p_log_variance)
    decoder = -decoder_log_likelihood(x_0.numpy(), p_mean.numpy(), p_log_variance.numpy() / 2, tanh_cdf)
    expected = torch.tensor([decoder[0].mean(), kl[1].mean(), kl[2].mean()]) / math.log(2)
    torch.testing.assert_close(term, expected, rtol=1e-7, atol=1e-9)
    one_t_for_all = bound_term(x_0, torch.tensor(3), q_mean, q_log_variance, p_mean, p_log_variance)
    torch.testing.assert_close(one_t_for_all, nats_to_bits(kl.flatten(1).mean(1)))


def test_units():
    assert nats_to_bits(torch.tensor(math.log(8.0))).item() == pytest.approx(3)
    assert torch.equal(mean_flat(torch.arange(12.0).view(2, 3, 1, 2)), torch.tensor([2.5, 8.5]))
