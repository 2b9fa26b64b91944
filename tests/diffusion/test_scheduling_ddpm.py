"""The diffusion process against the official outputs, 50-digit arithmetic, Bayes' rule on a grid and Gaussian data.

Wrong variants that have been seen in other code are kept as tests that the oracles can tell them from the right one.
"""

import copy
import inspect
import itertools
import json
import math
import pickle

import diffusers
import diffusers.schedulers.scheduling_ddpm as stock_module
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CASES,
    PREDICTION_TYPE,
    TIMESTEPS,
    VARIANCE_TYPE,
    GaussianData,
    exact_coefficients,
    official,
    official_noise,
    posterior_on_a_grid,
    relative_error,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_hf.diffusion.scheduling_ddpm as our_module
from ddpm_hf import DDPMScheduler
from ddpm_hf.diffusion.noise_schedule import OFFICIAL_SCHEDULES, STOCK_SCHEDULES, make_betas
from ddpm_hf.diffusion.scheduling_ddpm import PREDICTION_TYPES
from ddpm_hf.utils.errors import showing_flags

StockDDPMScheduler = diffusers.DDPMScheduler
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
BETAS = np.linspace(1e-4, 0.02, 1000)
FLOAT32_EXACT = 2e-6  # a dozen float32 roundings


@pytest.fixture
def feed_noise(monkeypatch):
    """Make `step` (ours and stock's) take the noise that it is given."""

    def feed(noise: torch.Tensor) -> None:
        def draw(shape, generator=None, device=None, dtype=None):
            return noise.expand(shape).to(device=device, dtype=dtype)

        monkeypatch.setattr(our_module, "standard_normal", draw)
        monkeypatch.setattr(stock_module, "randn_tensor", draw)

    return feed


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network_output(x_t: torch.Tensor, variance_type: str, seed: int = 1) -> torch.Tensor:
    channels = x_t.shape[1] * (2 if variance_type.startswith("learned") else 1)
    return images(len(x_t), channels, *x_t.shape[2:], seed=seed, dtype=x_t.dtype)


# ====================================================================== the official implementation's outputs


@pytest.mark.parametrize("name", ["linear", "quad", "const", "jsd", "warmup10", "warmup50"])
def test_official_schedules(name):
    expected = official(f"betas_{name}").numpy()
    np.testing.assert_allclose(make_betas(name, 1000, 1e-4, 0.02), expected, rtol=1e-12, atol=0)
    scheduler = DDPMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    assert scheduler._betas.dtype == np.float64
    np.testing.assert_allclose(scheduler._betas, expected, rtol=1e-12, atol=0)


def test_stock_schedules_fail_the_test_of_official_schedules():
    stock = StockDDPMScheduler(beta_schedule="linear").betas.double().numpy()
    assert np.abs(stock / official("betas_linear").numpy() - 1).max() > 1e-8


@pytest.mark.parametrize(("mean", "var", "t"), CASES)
def test_official_forward_process(mean, var, t):
    prefix, timesteps = f"{mean}_{var}_{t}_", torch.tensor(TIMESTEPS[t])
    scheduler = DDPMScheduler(variance_type=VARIANCE_TYPE[var], prediction_type=PREDICTION_TYPE[mean])
    x_0, x_t = official("x0"), official(prefix + "xt")
    assert relative_error(scheduler.add_noise(x_0, official("noise"), timesteps), x_t) < FLOAT32_EXACT
    q_mean, q_variance, q_log_variance = scheduler.q_posterior(x_0, x_t, timesteps)
    assert relative_error(q_mean, official(prefix + "qpost_mean")) < FLOAT32_EXACT
    torch.testing.assert_close(q_variance, official(prefix + "qpost_var"), rtol=FLOAT32_EXACT, atol=0)
    torch.testing.assert_close(q_log_variance, official(prefix + "qpost_logvar"), rtol=FLOAT32_EXACT, atol=0)


def official_reverse_errors(scheduler, prefix: str, timesteps: torch.Tensor) -> dict[str, float]:
    """How far p_mean_variance and step are from the recorded arrays, given the recorded x_t and network output."""
    x_t, output = official(prefix + "xt"), official(prefix + "model_output")
    mean, variance, log_variance, x_0 = scheduler.p_mean_variance(output, timesteps, x_t, clip_denoised=True)
    step = scheduler.step(output, timesteps, x_t)
    return {
        "mean": relative_error(mean, official(prefix + "mean")),
        "variance": relative_error(variance, official(prefix + "logvar").double().exp()),
        "logvar": relative_error(log_variance, official(prefix + "logvar")),
        "pred_xstart": relative_error(x_0, official(prefix + "pred_xstart")),
        "step_pred_xstart": relative_error(step.pred_original_sample, official(prefix + "pred_xstart")),
        "sample": relative_error(step.prev_sample, official(prefix + "sample")),
    }


@pytest.mark.parametrize(("mean", "var", "t"), CASES)
def test_official_reverse_process(mean, var, t, feed_noise):
    feed_noise(official_noise())
    scheduler = DDPMScheduler(variance_type=VARIANCE_TYPE[var], prediction_type=PREDICTION_TYPE[mean])
    errors = official_reverse_errors(scheduler, f"{mean}_{var}_{t}_", torch.tensor(TIMESTEPS[t]))
    assert max(errors.values()) < 2e-5, errors
    # The log twins are the same variances.
    twin = DDPMScheduler(variance_type=VARIANCE_TYPE[var] + "_log", prediction_type=PREDICTION_TYPE[mean])
    assert official_reverse_errors(twin, f"{mean}_{var}_{t}_", torch.tensor(TIMESTEPS[t])) == errors


@pytest.mark.parametrize("t", ["0", "37"])  # at 998 and 999 beta and beta_tilde differ by less than float32 shows
def test_beta_where_beta_tilde_belongs_fails_the_official_outputs(t, feed_noise):
    feed_noise(official_noise())
    wrong = DDPMScheduler(variance_type="fixed_large")
    errors = official_reverse_errors(wrong, f"eps_fixedsmall_{t}_", torch.tensor(TIMESTEPS[t]))
    assert errors["logvar"] > 1e-4
    assert errors["sample"] > 2e-5


def test_noise_at_the_last_step_fails_the_official_outputs(feed_noise, monkeypatch):
    feed_noise(official_noise())
    wrong = DDPMScheduler(variance_type="fixed_large")
    gather = wrong._chain.gather

    def always_noisy(*args):
        columns = gather(*args)
        return {**columns, "has_previous": torch.ones_like(columns["has_previous"])}

    monkeypatch.setattr(wrong._chain, "gather", always_noisy)
    errors = official_reverse_errors(wrong, "eps_fixedlarge_0_", torch.tensor([0, 1]))
    assert errors["mean"] < 2e-5 < 1e-3 < errors["sample"]


def test_float32_tables_fail_the_official_outputs(feed_noise):
    """Stock's tables are wrong in the fourth digit where beta is small."""
    feed_noise(torch.zeros(1))
    variance = StockDDPMScheduler(variance_type="fixed_small")._get_variance(1)
    assert abs(variance / official("xstart_fixedsmall_0_qpost_var")[1].item() - 1) > 2e-5
    config = {"prediction_type": "sample", "variance_type": "fixed_small"}
    # The second image of one recording and the first of another: t = 1 and t = 37
    for prefix, row, t in (("xstart_fixedsmall_0_", 1, 1), ("xstart_fixedsmall_37_", 0, 37)):
        x_t, output, q_mean, q_variance, recorded = (
            official(prefix + name)[row : row + 1]
            for name in ("xt", "model_output", "qpost_mean", "qpost_var", "vb_clip")
        )
        errors = []
        for scheduler in (DDPMScheduler(**config), StockDDPMScheduler(**config)):
            mean = scheduler.step(output, t, x_t).prev_sample.double()
            kl = ((mean - q_mean) ** 2 / q_variance).mean().item() / 2 / np.log(2)  # of equal variances, bits/dim
            errors.append(abs(kl / recorded.item() - 1))
        assert errors[0] < 2e-5 < errors[1], errors


# ====================================================================== 50 digits


@pytest.mark.parametrize("schedule", ["linear", "quad", "const", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("t", [0, 1, 2, 10, 37, 500, 998, 999])
def test_tables_are_right_to_twelve_digits(schedule, t):
    """Read out through the public functions, with unit vectors in float64."""
    scheduler = DDPMScheduler(beta_schedule=schedule, clip_sample=False)
    exact = exact_coefficients(scheduler._betas, t, t - 1)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    q_mean, q_variance, q_log_variance = scheduler.q_mean_variance(one, t)
    from_x_0, beta_tilde, _ = scheduler.q_posterior(one, zero, t)
    found = {
        "sqrt_alpha_bar": scheduler.add_noise(one, zero, t),
        "sqrt_one_minus_alpha_bar": scheduler.add_noise(zero, one, t),
        "log_one_minus_alpha_bar": q_log_variance,
        "beta_tilde": beta_tilde,
        "mean_from_x_0": from_x_0,
        "mean_from_x_t": scheduler.q_posterior(zero, one, t)[0],
        "x_0_from_x_t": scheduler.p_mean_variance(zero, t, one, clip_denoised=False)[3],
        "x_0_from_eps": scheduler.p_mean_variance(one, t, zero, clip_denoised=False)[3],
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(exact[name], rel=1e-12), name
    assert q_mean.item() == pytest.approx(exact["sqrt_alpha_bar"], rel=1e-12)
    assert q_variance.item() == pytest.approx(exact["sqrt_one_minus_alpha_bar"] ** 2, rel=1e-12)


@pytest.mark.parametrize("schedule", STOCK_SCHEDULES)
@pytest.mark.parametrize("T", [1000, 37])
def test_stock_schedules_are_stock_to_float32(schedule, T):
    ours = DDPMScheduler(beta_schedule=schedule, num_train_timesteps=T)
    stock = StockDDPMScheduler(beta_schedule=schedule, num_train_timesteps=T)
    # Stock rounds alpha_bar ratios near 1 and beta near 1e-4 to float32.
    torch.testing.assert_close(ours.betas, stock.betas, rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr():
    ours = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    stock = StockDDPMScheduler(rescale_betas_zero_snr=True)
    assert ours.alphas_cumprod[-1] == 0
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=0, atol=2e-6)


# ====================================================================== Bayes' rule on a grid


@pytest.mark.parametrize("t", [1, 2, 40, 500, 999])
@pytest.mark.parametrize(("x_0", "x_t"), [(0.8, 0.3), (-1.0, 1.7), (0.0, -0.5)])
def test_posterior_is_bayes_rule(t, x_0, x_t):
    mean, variance = posterior_on_a_grid(BETAS, t, x_0, x_t)
    found = DDPMScheduler().q_posterior(torch.tensor([[x_0]]).double(), torch.tensor([[x_t]]).double(), t)
    assert found[0].item() == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert found[1].item() == pytest.approx(variance, rel=1e-6)
    assert found[2].item() == pytest.approx(np.log(variance), rel=1e-6)


def test_posterior_at_the_first_timestep_is_the_data_itself():
    x_0, x_t = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1)
    mean, variance, log_variance = DDPMScheduler().q_posterior(x_0, x_t, 0)
    assert torch.equal(mean, x_0)
    assert variance.item() == 0
    assert (
        log_variance.item() == DDPMScheduler().q_posterior(x_0, x_t, 1)[2].item()
    )  # clipped, as in the official code


@pytest.mark.parametrize("timesteps", [[999, 700, 3], [600, 20, 0]])
def test_a_subsequence_steps_by_its_own_posterior(timesteps, feed_noise):
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    x_0, x_t = torch.full((2, 1), 0.8).double(), torch.full((2, 1), -0.3).double()
    feed_noise(torch.tensor([[0.0], [1.0]]))
    for t, s in itertools.pairwise(timesteps):
        mean, variance = posterior_on_a_grid(BETAS, t, 0.8, -0.3, s)
        quiet, noisy = scheduler.step(x_0, t, x_t).prev_sample.flatten().tolist()
        assert quiet == pytest.approx(mean, rel=1e-6)
        assert (noisy - quiet) ** 2 == pytest.approx(variance, rel=1e-6)


# ====================================================================== Gaussian data: every moment is known

SUBSEQUENCES = {
    "full": {"num_inference_steps": 1000},
    "leading-10": {"num_inference_steps": 10},
    "leading-50": {"num_inference_steps": 50},
    "leading-7": {"num_inference_steps": 7},
    "trailing-10": {"num_inference_steps": 10, "timestep_spacing": "trailing"},
    "trailing-50": {"num_inference_steps": 50, "timestep_spacing": "trailing"},
    "linspace-10": {"num_inference_steps": 10, "timestep_spacing": "linspace"},
    "linspace-50": {"num_inference_steps": 50, "timestep_spacing": "linspace"},
    "custom": {"timesteps": [999, 998, 700, 300, 299, 5]},
    "one": {"timesteps": [999]},
}
DATA = GaussianData(mean=0.3, std=0.5, betas=BETAS)


def make_chain(name: str, scheduler_class=DDPMScheduler, **config):
    arguments = dict(SUBSEQUENCES[name])
    if "timestep_spacing" in arguments:
        config["timestep_spacing"] = arguments.pop("timestep_spacing")
    scheduler = scheduler_class(clip_sample=False, **config)
    scheduler.set_timesteps(**arguments)
    return scheduler


def best_output(data: GaussianData, scheduler, x: torch.Tensor, t: int) -> torch.Tensor:
    """What the best network says for x_t = x, by prediction type."""
    eps_slope, eps_offset = data.expected_noise(t)
    x_0_slope, x_0_offset = data.expected_x_0(t)
    eps, x_0 = eps_slope * x + eps_offset, x_0_slope * x + x_0_offset
    a = data.alpha_bar[t]
    if scheduler.config.prediction_type == "epsilon":
        return eps
    if scheduler.config.prediction_type == "sample":
        return x_0
    if scheduler.config.prediction_type == "v_prediction":
        return a**0.5 * eps - (1 - a) ** 0.5 * x_0
    a_before = data.alpha_bar[t - 1] if t else 1.0
    beta = BETAS[t]
    return a_before**0.5 * beta / (1 - a) * x_0 + (1 - beta) ** 0.5 * (1 - a_before) / (1 - a) * x


def chain_moments(data: GaussianData, scheduler, start=(0.0, 1.0)) -> list[tuple[float, float]]:
    """Mean and variance of x after every step, read off what `step` does to 0, to 1 and to noise 1.

    Needs `feed_noise` with the noise (0, 0, 1).
    """
    mean, variance = start
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    out = []
    for t in scheduler.timesteps.tolist():
        offset, gain, std = scheduler.step(best_output(data, scheduler, x, t), t, x).prev_sample.flatten().tolist()
        gain, std = gain - offset, std - offset
        mean, variance = gain * mean + offset, gain**2 * variance + std**2
        out.append((mean, variance))
    return out


def moments_error(found, expected) -> float:
    """The largest error of means (relative to a standard deviation) and of variances (relative), over the chain."""
    errors = [
        max(abs(m_1 - m_2) / v_2**0.5, abs(v_1 / v_2 - 1))
        for (m_1, v_1), (m_2, v_2) in zip(found, expected, strict=True)
    ]
    return max(errors)


UNIT_NOISE = torch.tensor([[0.0], [0.0], [1.0]])


@pytest.mark.parametrize("chain", SUBSEQUENCES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_gaussian_data_has_the_exact_reverse_moments(chain, variance_type, feed_noise):
    feed_noise(UNIT_NOISE)
    scheduler = make_chain(chain, variance_type=variance_type)
    expected = DATA.reverse_moments(scheduler.timesteps.tolist(), large="large" in variance_type)
    assert moments_error(chain_moments(DATA, scheduler), expected) < 1e-10


def with_optimal_variance(scheduler: DDPMScheduler, data: GaussianData) -> DDPMScheduler:
    scheduler.set_prediction_error([data.unknown_of_x_0(t) for t in range(1000)])
    return scheduler


@pytest.mark.parametrize("chain", SUBSEQUENCES)
def test_the_optimal_variance_keeps_gaussian_data_gaussian(chain, feed_noise):
    """The error of x_0 gives the variance of x_s given x_t, so that the chain has the marginals of q at every step.

    But for the last two steps: the last noise is limited, for it would stay in the image.
    """
    feed_noise(UNIT_NOISE)
    scheduler = with_optimal_variance(make_chain(chain, variance_type="optimal"), DATA)
    timesteps = scheduler.timesteps.tolist()
    expected = DATA.reverse_moments(timesteps, large=False, optimal=True)
    assert moments_error(chain_moments(DATA, scheduler), expected) < 1e-6  # the error is kept in seven digits
    marginals = [DATA.marginal(s) for s in timesteps[1:-1]]
    if marginals:
        start = DATA.marginal(timesteps[0])
        assert moments_error(chain_moments(DATA, scheduler, start)[:-2], marginals) < 1e-6
        small = make_chain(chain, variance_type="fixed_small")
        assert moments_error(chain_moments(DATA, small, start)[:-2], marginals) > 1e-3


def test_a_perfect_network_has_the_error_of_analytic_dpm():
    """Bao et al. 2022: the error follows from E||eps||^2, whose closed form for Gaussian data is known."""
    for t in (0, 10, 500, 999):
        a, (slope, offset), (mean, variance) = DATA.alpha_bar[t], DATA.expected_noise(t), DATA.marginal(t)
        eps_squared = slope**2 * variance + (slope * mean + offset) ** 2
        assert DATA.unknown_of_x_0(t) == pytest.approx((1 - a) / a * (1 - eps_squared), rel=1e-6)


def test_the_optimal_variance_has_the_smallest_bound():
    """E KL(q || p) in closed form: a variance on either side of the optimal one costs more."""
    scheduler = with_optimal_variance(DDPMScheduler(variance_type="optimal"), DATA)
    for t in (1, 5, 50, 400, 999):
        x = torch.zeros(1, 1, dtype=torch.float64)
        variance = scheduler.p_mean_variance(x, t, x)[1].item()
        a_t, a_s = DATA.alpha_bar[t], DATA.alpha_bar[t - 1]
        gap = a_s * (BETAS[t] / (1 - a_t)) ** 2 * DATA.unknown_of_x_0(t)
        beta_tilde = BETAS[t] * (1 - a_s) / (1 - a_t)

        def kl(p_variance, gap=gap, q_variance=beta_tilde):
            return math.log(p_variance / q_variance) + (q_variance + gap) / p_variance - 1

        assert kl(variance) < min(kl(variance * 1.01), kl(variance * 0.99), kl(beta_tilde), kl(BETAS[t]))


def test_the_measured_error_is_saved_where_stock_does_not_look(tmp_path, capfd):
    scheduler = with_optimal_variance(DDPMScheduler(variance_type="optimal", beta_schedule="quad"), DATA)
    scheduler.save_pretrained(tmp_path)
    stock = StockDDPMScheduler.from_pretrained(tmp_path)
    assert stock.config.variance_type == "fixed_small"
    assert "not expected" not in capfd.readouterr().err
    again = DDPMScheduler.from_pretrained(tmp_path)
    assert (again.variance_type, again.config.variance_type) == ("optimal", "optimal")
    assert np.array_equal(again._chain.table, scheduler._chain.table, equal_nan=True)
    assert json.loads(again.to_json_string()) == json.loads(scheduler.to_json_string())
    small = DDPMScheduler.from_config(again.config, variance_type="fixed_small")
    back = DDPMScheduler.from_config(small.config, variance_type="optimal")
    assert np.array_equal(back._process.table, scheduler._process.table, equal_nan=True)
    StockDDPMScheduler.from_config(again.config)
    stock.save_pretrained(tmp_path / "stock")  # and what stock writes again still has it
    assert DDPMScheduler.from_pretrained(tmp_path / "stock").variance_type == "optimal"


def test_an_unmeasured_optimal_variance_says_what_to_do():
    scheduler = DDPMScheduler(variance_type="optimal")
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="ddpm-hf optimal_variance"):
        scheduler.step(x, 999, x)
    for wrong in ([0.1] * 999, [0.1] * 999 + [-1.0], [0.1] * 999 + [float("nan")]):
        with pytest.raises(ValueError, match="1000 finite numbers"):
            scheduler.set_prediction_error(wrong)


def test_fixed_large_over_few_steps_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(DDPMScheduler, "_warned_of_fixed_large", False)
    logger = diffusers_logging.get_logger("ddpm_hf.diffusion.scheduling_ddpm")
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    DDPMScheduler(variance_type="fixed_small").set_timesteps(10)
    DDPMScheduler(variance_type="fixed_large").set_timesteps(1000)
    assert said == []
    for _ in range(2):
        DDPMScheduler(variance_type="fixed_large").set_timesteps(10)
    assert len(said) == 1
    assert said[0].startswith("variance_type='fixed_large' over 10 steps")
    assert "better: variance_type='optimal' (after ddpm-hf optimal_variance) or fixed_small" in said[0]
    monkeypatch.setattr(DDPMScheduler, "_warned_of_fixed_large", False)
    with showing_flags():
        DDPMScheduler(variance_type="fixed_large").set_timesteps(10)
    assert "better: --variance_type optimal (after" in said[1]


@pytest.mark.parametrize("chain", ["full", "leading-10", "trailing-50", "custom"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_has_the_same_chain(chain, prediction_type, feed_noise):
    """Also over fewer steps, where a prediction of mu_tilde (of the step to t - 1) is not the chain's own mean."""
    feed_noise(UNIT_NOISE)
    scheduler = make_chain(chain, prediction_type=prediction_type)
    expected = DATA.reverse_moments(scheduler.timesteps.tolist(), large=False)
    assert moments_error(chain_moments(DATA, scheduler), expected) < 1e-9


@pytest.mark.parametrize("chain", ["full", "leading-50"])
def test_float32_tables_fail_the_gaussian_chain(chain, feed_noise):
    feed_noise(UNIT_NOISE)
    stock = make_chain(chain, StockDDPMScheduler, variance_type="fixed_small")
    expected = DATA.reverse_moments(stock.timesteps.tolist(), large=False)
    assert 1e-6 < moments_error(chain_moments(DATA, stock), expected) < 0.05  # wrong by its tables only


@pytest.mark.parametrize("chain", ["full", "leading-50", "custom"])
def test_beta_where_beta_tilde_belongs_fails_the_gaussian_chain(chain, feed_noise):
    feed_noise(UNIT_NOISE)
    wrong = make_chain(chain, variance_type="fixed_large")
    expected = DATA.reverse_moments(wrong.timesteps.tolist(), large=False)
    assert moments_error(chain_moments(DATA, wrong), expected) > 1e-2


@pytest.mark.parametrize("chain", ["full", "leading-50", "custom"])
def test_noise_at_the_last_step_fails_the_gaussian_chain(chain, feed_noise):
    feed_noise(UNIT_NOISE)
    wrong = make_chain(chain, variance_type="fixed_large")
    wrong._chain.table[wrong.timesteps[-1], wrong._chain.columns.index("has_previous")] = 1
    found = chain_moments(DATA, wrong)
    expected = DATA.reverse_moments(wrong.timesteps.tolist(), large=True)
    assert moments_error(found[:-1], expected[:-1]) < 1e-10
    assert moments_error(found, expected) > 1e-5


@pytest.mark.parametrize("chain", ["leading-10", "trailing-50"])
def test_the_betas_of_the_whole_chain_fail_on_a_subsequence(chain, feed_noise):
    """The mistake of taking every tenth step of the 1000-step chain as it is."""
    feed_noise(UNIT_NOISE)
    wrong = make_chain(chain)
    expected = DATA.reverse_moments(wrong.timesteps.tolist(), large=False)
    wrong._sampling_chain = wrong._whole_chain
    assert moments_error(chain_moments(DATA, wrong), expected) > 0.1


@pytest.mark.parametrize("chain", ["full", "leading-50", "trailing-10", "custom"])
def test_beta_is_the_optimal_variance_for_standard_normal_data(chain, feed_noise):
    """Section 3.2: "The first choice is optimal for x_0 ~ N(0, I)": every marginal stays N(0, 1)."""
    feed_noise(UNIT_NOISE)
    data = GaussianData(0.0, 1.0, BETAS)
    moments = chain_moments(data, make_chain(chain, variance_type="fixed_large"))
    for mean, variance in moments[:-1]:
        assert mean == pytest.approx(0, abs=1e-12)
        assert variance == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("chain", ["full", "leading-50", "trailing-10", "custom"])
def test_beta_tilde_is_the_optimal_variance_for_one_deterministic_image(chain, feed_noise):
    """Section 3.2: "the second is optimal for x_0 deterministically set to one point": the marginals are q's."""
    feed_noise(UNIT_NOISE)
    data = GaussianData(0.3, 0.0, BETAS)
    scheduler = make_chain(chain, variance_type="fixed_small")
    timesteps = scheduler.timesteps.tolist()
    moments = chain_moments(data, scheduler, start=data.marginal(timesteps[0]))
    for (mean, variance), t in zip(moments, [*timesteps[1:], None], strict=True):
        expected_mean, expected_variance = (0.3, 0.0) if t is None else data.marginal(t)
        assert mean == pytest.approx(expected_mean, rel=1e-9)
        assert variance == pytest.approx(expected_variance, rel=1e-9, abs=1e-18)


def test_the_whole_chain_ends_at_the_data(feed_noise):
    feed_noise(UNIT_NOISE)
    mean, variance = chain_moments(DATA, make_chain("full"))[-1]
    assert mean == pytest.approx(0.3, abs=2e-3)
    assert variance**0.5 == pytest.approx(0.5, rel=1e-2)  # beta_tilde is a little too small for data that varies


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_large_sample_has_the_moments_of_the_chain(variance_type):
    """With real noise from a generator, in float32."""
    scheduler = make_chain("trailing-10", variance_type=variance_type)
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    x = torch.randn(n, 1, generator=generator)
    expected = DATA.reverse_moments(scheduler.timesteps.tolist(), large="large" in variance_type)
    for t, (mean, variance) in zip(scheduler.timesteps, expected, strict=True):
        x = scheduler.step(best_output(DATA, scheduler, x, int(t)), t, x, generator=generator).prev_sample
        assert abs(x.mean().item() - mean) < 5 * (variance / n) ** 0.5
        assert abs(x.var().item() / variance - 1) < 5 * (2 / n) ** 0.5


# ====================================================================== predictions


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0, 1, 37, 500, 999])
def test_a_perfect_prediction_gives_back_x_0_and_the_posterior(prediction_type, variance_type, t):
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type, clip_sample=False)
    x_0, noise = images(3, 2, 4, 4, dtype=torch.float64), images(3, 2, 4, 4, seed=1, dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, t)
    output = scheduler.get_target(x_0, noise, t)
    raw = images(3, 2, 4, 4, seed=2, dtype=torch.float64)
    if variance_type.startswith("learned"):
        output = torch.cat([output, raw], dim=1)
    mean, variance, log_variance, found = scheduler.p_mean_variance(output, t, x_t, clip_denoised=False)
    torch.testing.assert_close(found, x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, scheduler.q_posterior(x_0, x_t, t)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scheduler.step(output, t, x_t).pred_original_sample, x_0, rtol=1e-9, atol=1e-9)
    assert mean.shape == variance.shape == log_variance.shape == x_t.shape
    torch.testing.assert_close(variance.log(), log_variance)

    # The variances, each from its definition
    exact = exact_coefficients(BETAS, t, t - 1)
    log_small = np.log(exact["beta_tilde"] if t else exact_coefficients(BETAS, 1, 0)["beta_tilde"])
    log_large = np.log(BETAS[t]) if t else log_small
    expected = {
        "fixed_small": torch.tensor(log_small),
        "fixed_large": torch.tensor(log_large),
        "learned": raw,
        # Nichol & Dhariwal, Eq. 15: exp(v log beta + (1 - v) log beta_tilde), v = (raw + 1) / 2
        "learned_range": (raw + 1) / 2 * np.log(BETAS[t]) + (1 - raw) / 2 * log_small,
    }[variance_type.removesuffix("_log")]
    torch.testing.assert_close(log_variance, expected.expand_as(log_variance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("t", [1, 500, 999])
def test_step_adds_the_variance_of_p(variance_type, t, feed_noise):
    """The noise's standard deviation in `step` is the one that `p_mean_variance` reports."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    x_t = images(2, 3, 4, 4, dtype=torch.float64)
    output = network_output(x_t, variance_type)
    noise = images(2, 3, 4, 4, seed=5, dtype=torch.float64)
    feed_noise(noise)
    mean, variance, _, _ = scheduler.p_mean_variance(output, t, x_t)
    expected = mean + variance.sqrt() * noise
    torch.testing.assert_close(scheduler.step(output, t, x_t).prev_sample, expected, rtol=1e-12, atol=1e-12)
    both = torch.tensor([t, 0])
    found = scheduler.step(output, both, x_t).prev_sample
    mean, variance, _, _ = scheduler.p_mean_variance(output, both, x_t)
    torch.testing.assert_close(found[0], (mean + variance.sqrt() * noise)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], mean[1], rtol=1e-12, atol=1e-12)


def test_clipping():
    x_t, output = 3 * images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    assert DDPMScheduler().step(output, 900, x_t).pred_original_sample.abs().max() == 1
    half = DDPMScheduler(clip_sample_range=0.5)
    assert half.step(output, 900, x_t).pred_original_sample.abs().max() == 0.5
    assert half.p_mean_variance(output, 900, x_t, clip_denoised=True)[3].abs().max() == 0.5
    assert half.p_mean_variance(output, 900, x_t, clip_denoised=False)[3].abs().max() > 10
    assert DDPMScheduler(clip_sample=False).step(output, 900, x_t).pred_original_sample.abs().max() > 10


def test_dynamic_thresholding_is_stocks():
    config = {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.9}
    x_t, output = 3 * images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1)
    ours, stock = (cls(**config).step(output, 0, x_t) for cls in (DDPMScheduler, StockDDPMScheduler))
    torch.testing.assert_close(ours.pred_original_sample, stock.pred_original_sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("generators", [1, 2])
def test_step_is_stocks_but_for_the_tables(prediction_type, variance_type, generators):
    """The same noise in the same order, and stock's errors are small for images in [-1, 1]."""
    config = {"prediction_type": prediction_type, "variance_type": variance_type}
    x_t = images(2, 3, 4, 4)
    output = network_output(x_t, variance_type)
    ours, stock = DDPMScheduler(**config), StockDDPMScheduler(**config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    for t in ours.timesteps[[0, 20, 49]]:
        steps = []
        for scheduler in (ours, stock):
            made = [torch.Generator().manual_seed(i) for i in range(generators)]
            steps.append(scheduler.step(output, t, x_t, generator=made if generators > 1 else made[0]))
        torch.testing.assert_close(steps[0].prev_sample, steps[1].prev_sample, rtol=0, atol=1e-3)
        torch.testing.assert_close(steps[0].pred_original_sample, steps[1].pred_original_sample, rtol=0, atol=2e-3)


# ====================================================================== any schedule, any t, any dtype

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def processes(draw, smallest: float = 1e-12, largest: float = 0.9999):
    """Configurations of any valid schedule, with the variance and prediction types."""
    config = {"variance_type": draw(st.sampled_from(VARIANCE_TYPES))}
    if draw(st.booleans()):
        betas = draw(st.lists(st.floats(smallest, largest), min_size=1, max_size=10))
        config |= {"trained_betas": betas, "num_train_timesteps": len(betas)}
    else:
        config |= {
            "beta_schedule": draw(st.sampled_from(STOCK_SCHEDULES + OFFICIAL_SCHEDULES)),
            "num_train_timesteps": draw(st.integers(2, 40)),
            "beta_start": draw(st.floats(smallest, 0.01)),
            "beta_end": draw(st.floats(0.01, min(largest, 0.5))),
        }
    # jsd ends at beta = 1, from where epsilon cannot come back
    known = PREDICTION_TYPES[1:] if config.get("beta_schedule") == "jsd" else PREDICTION_TYPES
    return config | {"prediction_type": draw(st.sampled_from(known))}


def log_alpha_bar(scheduler) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.cumsum(np.log1p(-scheduler._betas))


@QUICK
@given(config=processes())
def test_alpha_bar_falls_and_coefficients_are_finite(config):
    scheduler = DDPMScheduler(**config)
    T = config["num_train_timesteps"]
    assert (np.diff(log_alpha_bar(scheduler)) < 0).all()
    assert (scheduler._process.alpha_bar[1:] <= scheduler._process.alpha_bar[:-1]).all()
    assert 0 <= scheduler._process.alpha_bar[-1] <= scheduler._process.alpha_bar[0] < 1
    x = torch.ones(T, 1, dtype=torch.float64)
    t = torch.arange(T)
    for values in (scheduler.q_mean_variance(x, t), scheduler.q_posterior(x, x, t)):
        assert all(torch.isfinite(value).all() for value in values)
    _, q_variance, _ = scheduler.q_mean_variance(x, t)
    _, beta_tilde, log_beta_tilde = scheduler.q_posterior(x, x, t)
    assert (q_variance.flatten().diff() >= 0).all()
    assert beta_tilde[0] == 0
    assert (beta_tilde.flatten()[1:] > 0).all()
    assert (beta_tilde.flatten() <= torch.from_numpy(scheduler._betas)).all()
    torch.testing.assert_close(log_beta_tilde[1:], beta_tilde[1:].log(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(config=processes(), data=st.data())
def test_everything_is_finite_for_any_schedule_and_dtype(dtype, config, data):
    scheduler = DDPMScheduler(**config)
    T = config["num_train_timesteps"]
    t = torch.tensor(data.draw(st.lists(st.integers(0, T - 1), min_size=3, max_size=3)))
    x_0, noise = images(3, 2, 2, 2, dtype=dtype).clamp(-1, 1), images(3, 2, 2, 2, seed=1, dtype=dtype)
    x_t = scheduler.add_noise(x_0, noise, t)
    output = network_output(x_t, config["variance_type"])
    step = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0))
    for value in (
        x_t,
        scheduler.get_velocity(x_0, noise, t),
        scheduler.get_target(x_0, noise, t),
        *scheduler.q_mean_variance(x_0, t),
        *scheduler.q_posterior(x_0, x_t, t),
        *scheduler.p_mean_variance(output, t, x_t),
        step.prev_sample,
        step.pred_original_sample,
    ):
        assert torch.isfinite(value).all()
    assert x_t.dtype == step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
    assert step.prev_sample.shape == x_t.shape


@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(config=processes(smallest=1e-5, largest=0.5), data=st.data())
def test_one_timestep_per_image_is_that_many_calls(dtype, config, data):
    scheduler = DDPMScheduler(**config)
    T = config["num_train_timesteps"]
    if data.draw(st.booleans()):
        scheduler.set_timesteps(data.draw(st.integers(1, T)))
    t = torch.tensor(data.draw(st.lists(st.sampled_from(scheduler.timesteps.tolist()), min_size=4, max_size=4)))
    x_t = images(4, 2, 3, 3, dtype=dtype)
    output = network_output(x_t, config["variance_type"])

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = scheduler.step(output, t, x_t, generator=generators(0, 1, 2, 3))
    # alpha_bar may fall to 2^-40 in these chains, so that the sum behind x_0 has terms this large; a few roundings.
    size = max(1.0, scheduler.alphas_cumprod.clamp_min(1e-30).rsqrt().max().item())
    close = {
        "rtol": 2 * torch.finfo(dtype).eps,
        "atol": 16 * size * torch.finfo(torch.promote_types(dtype, torch.float32)).eps,
    }
    close["atol"] = max(close["atol"], torch.finfo(dtype).eps)
    for i in range(4):
        one, value = slice(i, i + 1), t[i].item()
        for timestep in (t[one], t[i], value):
            for generator in (generators(i), generators(i)[0], tuple(generators(i))):
                alone = scheduler.step(output[one], timestep, x_t[one], generator=generator)
                torch.testing.assert_close(alone.prev_sample, together.prev_sample[one], **close)
                torch.testing.assert_close(alone.pred_original_sample, together.pred_original_sample[one], **close)


@pytest.mark.parametrize("t", [0, torch.tensor(0), torch.tensor([0]), torch.tensor([5, 5, 5])])
def test_every_form_of_t_everywhere(t):
    x_0, noise = images(3, 2, 4, 4).double(), images(3, 2, 4, 4, seed=1).double()
    scheduler = DDPMScheduler()
    value = int(torch.as_tensor(t).reshape(-1)[0])
    for call in (
        lambda t: scheduler.add_noise(x_0, noise, t),
        lambda t: scheduler.get_velocity(x_0, noise, t),
        lambda t: scheduler.q_mean_variance(x_0, t)[0],
        lambda t: scheduler.q_posterior(x_0, noise, t)[0],
        lambda t: scheduler.get_target(x_0, noise, t),
        lambda t: scheduler.p_mean_variance(noise, t, x_0)[0],
        lambda t: scheduler.step(noise, t, x_0, generator=torch.Generator().manual_seed(0)).prev_sample,
    ):
        torch.testing.assert_close(call(t), call(value), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_noise_is_the_float32_result_rounded_once(dtype):
    scheduler = DDPMScheduler()
    x_0, noise = images(1000, 1, 4, 4, dtype=dtype), images(1000, 1, 4, 4, seed=1, dtype=dtype)
    t = torch.arange(1000)
    low, full = scheduler.add_noise(x_0, noise, t), scheduler.add_noise(x_0.float(), noise.float(), t)
    assert low.dtype == dtype
    assert torch.equal(low, full.to(dtype))
    velocity = scheduler.get_velocity(x_0.float(), noise.float(), t)
    assert torch.equal(scheduler.get_velocity(x_0, noise, t), velocity.to(dtype))


def test_sigma_is_not_zero_in_bf16():
    zero, one = torch.zeros(10, 1, dtype=torch.bfloat16), torch.ones(10, 1, dtype=torch.bfloat16)
    t = torch.arange(10)
    sigma = DDPMScheduler().add_noise(zero, one, t).flatten().double().numpy()
    exact = [exact_coefficients(BETAS, int(i), int(i) - 1)["sqrt_one_minus_alpha_bar"] for i in t]
    np.testing.assert_allclose(sigma, exact, rtol=2**-8)
    assert not StockDDPMScheduler().add_noise(zero, one, t).any()  # what is avoided: 1 - alpha_bar in bf16 is 0


def test_the_last_step_draws_no_noise_and_the_others_do():
    scheduler = DDPMScheduler(variance_type="fixed_large")
    x_t, output = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1)
    for chain, last in (([999, 500, 37], 37), ([999, 0], 0), ([250], 250)):
        scheduler.set_timesteps(timesteps=chain)
        for t in chain:
            generator = torch.Generator().manual_seed(0)
            before = generator.get_state()
            step = scheduler.step(output, t, x_t, generator=generator).prev_sample
            assert torch.equal(generator.get_state(), before) == (t == last)
            again = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
            assert torch.equal(step, again) == (t == last)
    # Stock asks whether t > 0 and leaves noise in the image.
    stock = StockDDPMScheduler(variance_type="fixed_large")
    stock.set_timesteps(timesteps=[999, 500, 37])
    made = [stock.step(output, 37, x_t, generator=torch.Generator().manual_seed(i)).prev_sample for i in range(2)]
    assert (made[0] - made[1]).abs().max() > 0.1


def test_inputs_are_left_alone():
    scheduler = DDPMScheduler()
    x_0, noise, t = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1), torch.tensor([3, 700])
    copies = [value.clone() for value in (x_0, noise, t)]
    scheduler.add_noise(x_0, noise, t)
    scheduler.step(noise, t, x_0)
    scheduler.p_mean_variance(noise, t, x_0)
    assert all(torch.equal(a, b) for a, b in zip((x_0, noise, t), copies, strict=True))


# ====================================================================== cost


class CountOps(TorchDispatchMode):
    """Counts ATen calls, and those among them that are not just another view of the same memory."""

    VIEWS = ("view", "unbind", "split", "expand", "slice", "select", "unsqueeze", "alias")

    def __enter__(self):
        self.calls: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        return sum(not any(view in call for view in self.VIEWS) for call in self.calls)


def count_step(scheduler, t) -> CountOps:
    scheduler.set_timesteps(1000)
    x_t = images(4, 3, 8, 8)
    output = network_output(x_t, scheduler.config.variance_type)
    scheduler.step(output, t, x_t)  # tables move once
    with CountOps() as counted:
        scheduler.step(output, t, x_t)
    return counted


@pytest.mark.parametrize(
    ("variance_type", "t", "calls", "kernels"),
    [
        ("fixed_small", 500, 7, 7),
        ("fixed_large", torch.tensor(500), 9, 8),
        ("fixed_large", torch.full((4,), 500), 15, 11),
        ("fixed_large", 0, 5, 5),
        ("learned", 500, 11, 10),
        ("learned_range", 500, 17, 16),
        ("learned_range", torch.full((4,), 500), 22, 17),
    ],
)
def test_a_step_costs_few_kernels(variance_type, t, calls, kernels):
    counted = count_step(DDPMScheduler(variance_type=variance_type), t)
    assert len(counted.calls) <= calls, counted.calls
    assert counted.kernels <= kernels, counted.calls


def test_stock_spends_many_kernels():
    counted = count_step(StockDDPMScheduler(variance_type="fixed_large"), torch.tensor(500))
    assert len(counted.calls) > 50
    assert counted.kernels > 40


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("t", [torch.tensor(500), torch.tensor([500, 0]), 500], ids=["0-d", "B", "int"])
def test_step_does_not_break_a_compiled_graph(variance_type, t):
    scheduler = DDPMScheduler(variance_type=variance_type)
    x_t = images(2, 3, 4, 4)
    output = network_output(x_t, variance_type)
    torch._dynamo.reset()
    compiles = CompileCounter()

    def denoise(output, t, x_t):
        return scheduler.step(output, t, x_t, generator=None).prev_sample

    compiled = torch.compile(denoise, fullgraph=True, backend=compiles)
    for set_timesteps in (lambda: None, lambda: scheduler.set_timesteps(10), lambda: scheduler.set_timesteps(20)):
        set_timesteps()  # the compiled step follows
        for _ in range(2):
            torch.manual_seed(0)
            found = compiled(output, t, x_t)
            torch.manual_seed(0)
            torch.testing.assert_close(found, denoise(output, t, x_t), rtol=1e-6, atol=1e-6)
    assert compiles.frame_count == 1


def test_the_training_side_does_not_break_a_compiled_graph():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    torch._dynamo.reset()

    def use(x_0, noise, t):
        x_t = scheduler.add_noise(x_0, noise, t)
        target = scheduler.get_target(x_0, noise, t)
        mean, _, log_variance, _ = scheduler.p_mean_variance(target, t, x_t)
        return mean + log_variance + scheduler.q_posterior(x_0, x_t, t)[0]

    arguments = images(2, 3, 4, 4), images(2, 3, 4, 4, seed=1), torch.tensor([3, 700])
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), use(*arguments), rtol=1e-5, atol=1e-5)


# ====================================================================== set_timesteps


def spaced(spacing: str, K: int, scheduler_class=DDPMScheduler, **config) -> list[int]:
    scheduler = scheduler_class(timestep_spacing=spacing, **config)
    scheduler.set_timesteps(K)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("K", [1, 2, 4, 5, 10, 20, 50, 100, 250, 500, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_stocks_where_K_divides_T(spacing, K):
    assert spaced(spacing, K) == spaced(spacing, K, StockDDPMScheduler)


@pytest.mark.parametrize("K", [3, 7, 30, 51, 99, 333, 501, 666, 999])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_trailing_and_linspace_are_stocks_everywhere(spacing, K):
    assert spaced(spacing, K) == spaced(spacing, K, StockDDPMScheduler)


@pytest.mark.parametrize("K", [7, 333, 501, 999])
def test_leading_covers_the_chain_where_K_does_not_divide_T(K):
    ours, stock = spaced("leading", K), spaced("leading", K, StockDDPMScheduler)
    assert len(ours) == K
    assert ours[0] == (K - 1) * 1000 // K
    gaps = -np.diff([*ours, 0])[:-1]
    assert set(gaps) <= {1000 // K, 1000 // K + 1}
    assert stock[0] <= ours[0]
    if K == 501:
        assert (stock[0], ours[0]) == (500, 998)  # stock puts pure noise in at the middle of the chain


@QUICK
@given(spacing=st.sampled_from(["leading", "trailing", "linspace"]), T=st.integers(1, 300), data=st.data())
def test_every_chain_falls_has_K_steps_and_ends_at_the_data(spacing, T, data):
    K = data.draw(st.integers(1, T))
    scheduler = DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    scheduler.set_timesteps(K)
    timesteps = scheduler.timesteps.tolist()
    assert scheduler.num_inference_steps == len(timesteps) == K
    assert T > timesteps[0] >= timesteps[-1] >= 0
    assert (np.diff(timesteps) < 0).all()
    assert [int(scheduler.previous_timestep(t)) for t in timesteps] == [*timesteps[1:], -1]
    x_t = torch.ones(1, 1)
    # A network that knows the image: the last step gives it, whichever t the chain ends with.
    known = DDPMScheduler.from_config(scheduler.config, prediction_type="sample", variance_type="fixed_large")
    known.set_timesteps(K)
    assert known.step(0.5 * x_t, timesteps[-1], x_t).prev_sample.item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("given_as", [list, tuple, np.array, torch.tensor])
def test_custom_timesteps(given_as):
    ours, stock = DDPMScheduler(), StockDDPMScheduler()
    ours.set_timesteps(timesteps=given_as([999, 500, 37]))
    stock.set_timesteps(timesteps=[999, 500, 37])
    assert ours.timesteps.tolist() == stock.timesteps.tolist() == [999, 500, 37]
    assert ours.timesteps.dtype == stock.timesteps.dtype
    assert ours.custom_timesteps is stock.custom_timesteps is True
    for t in ours.timesteps:
        assert int(ours.previous_timestep(t)) == int(stock.previous_timestep(t))
        assert ours.previous_timestep(int(t)) == int(stock.previous_timestep(int(t)))
    ours.set_timesteps(50)
    assert ours.custom_timesteps is False


def test_all_timesteps_are_the_whole_chain():
    x_t, output = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1)
    fresh, chosen = DDPMScheduler(), DDPMScheduler()
    chosen.set_timesteps(1000)
    for t in (0, 1, 500, 999):
        steps = [s.step(output, t, x_t, generator=torch.Generator().manual_seed(0)) for s in (fresh, chosen)]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)
    assert fresh.previous_timestep(7) == 6
    assert fresh.previous_timestep(0) == -1


def test_choosing_timesteps_does_not_touch_the_process():
    """Training and likelihood continue over all T timesteps while a pipeline samples with few."""
    scheduler = DDPMScheduler()
    x_0, noise, t = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1), torch.tensor([3, 700])
    before = scheduler.add_noise(x_0, noise, t), *scheduler.p_mean_variance(noise, t, x_0)
    scheduler.set_timesteps(10)
    after = scheduler.add_noise(x_0, noise, t), *scheduler.p_mean_variance(noise, t, x_0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scheduler.timesteps.device == torch.device("cpu")
    scheduler.set_timesteps(10, device="cpu")


# ====================================================================== beside stock


def test_every_attribute_of_stock_exists():
    ours, stock = DDPMScheduler(), StockDDPMScheduler()
    assert all(hasattr(ours, name) for name in vars(stock))
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(ours, name).shape == getattr(stock, name).shape
        torch.testing.assert_close(getattr(ours, name), getattr(stock, name), rtol=1e-3, atol=0)  # the dtype too
    assert torch.equal(ours.timesteps, stock.timesteps)
    for name in ("init_noise_sigma", "variance_type", "custom_timesteps", "num_inference_steps", "order"):
        assert getattr(ours, name) == getattr(stock, name)
    assert len(ours) == len(stock)
    x = torch.ones(1)
    assert ours.scale_model_input(x, 5) is x
    # EDM's networks see sigma instead of t: that process is another one
    assert set(stock.compatibles) - set(ours.compatibles) == {diffusers.EDMEulerScheduler}


def test_signatures_are_stocks():
    def arguments(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    assert arguments(DDPMScheduler.__init__) == arguments(StockDDPMScheduler.__init__)
    for name in ("step", "add_noise", "get_velocity", "set_timesteps", "scale_model_input", "previous_timestep"):
        assert list(arguments(getattr(DDPMScheduler, name))) == list(arguments(getattr(StockDDPMScheduler, name)))


def test_configuration_is_stocks():
    ours, stock = dict(DDPMScheduler().config), dict(StockDDPMScheduler().config)
    for config in (ours, stock):
        config["_use_default_values"] = sorted(config["_use_default_values"])
    assert ours == stock


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "fixed_large", "num_train_timesteps": 100, "timestep_spacing": "trailing"},
        {"beta_schedule": "quad"},
        {"beta_schedule": "warmup10", "beta_end": 0.01},
        {"beta_schedule": "jsd", "prediction_type": "sample"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"trained_betas": np.linspace(0.1, 0.2, 3), "num_train_timesteps": 3},
        {"trained_betas": torch.linspace(0.1, 0.2, 3), "num_train_timesteps": 3},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"},
    ],
)
def test_configurations_go_both_ways(config, tmp_path):
    ours = DDPMScheduler(**config)
    json.dumps(dict(ours.config))
    ours.save_pretrained(tmp_path)
    T = ours.config.num_train_timesteps
    for stock in (
        StockDDPMScheduler.from_config(ours.config),
        StockDDPMScheduler.from_pretrained(tmp_path),
        diffusers.DDIMScheduler.from_config(ours.config),
        diffusers.DPMSolverMultistepScheduler.from_config(ours.config) if T > 3 else ours,
    ):
        # Another tolerance than 0 only because stock computes in float32; zero SNR differs in the last digits most.
        torch.testing.assert_close(stock.betas, ours.betas, rtol=2e-3, atol=1e-6)
    for again in (
        DDPMScheduler.from_config(ours.config),
        DDPMScheduler.from_pretrained(tmp_path),
        DDPMScheduler.from_config(StockDDPMScheduler.from_config(ours.config).config),
    ):
        assert type(again) is DDPMScheduler
        assert np.array_equal(again._betas, ours._betas)
        assert {k: again.config[k] for k in inspect.signature(DDPMScheduler).parameters} == {
            k: ours.config[k] for k in inspect.signature(DDPMScheduler).parameters
        }


def test_it_is_recorded_as_stocks_class(tmp_path):
    scheduler = DDPMScheduler.from_preset("cifar10")
    assert scheduler.__module__ == StockDDPMScheduler.__module__
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDPMScheduler"
    assert saved["variance_type"] == "fixed_large"
    assert "trained_betas" in saved
    assert saved["trained_betas"] is None


def test_copies_and_pickles():
    scheduler = DDPMScheduler(beta_schedule="quad")
    scheduler.set_timesteps(10)
    x_t = images(2, 1, 4, 4)
    t = torch.tensor([900, 0])
    expected = scheduler.step(x_t, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    for again in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        found = again.step(x_t, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.equal(found, expected)


def test_step_without_a_dictionary():
    scheduler = DDPMScheduler()
    x_t = images(2, 1, 4, 4)
    as_tuple = scheduler.step(x_t, 0, x_t, return_dict=False)
    assert isinstance(as_tuple, tuple)
    output = scheduler.step(x_t, 0, x_t)
    assert torch.equal(as_tuple[0], output.prev_sample)
    assert torch.equal(as_tuple[1], output.pred_original_sample)


# ====================================================================== bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variance_type": "fixed_smal"}, r"'fixed_smal'.*did you mean 'fixed_small'"),
        ({"prediction_type": "eps"}, r"'eps'.*epsilon, sample, v_prediction, posterior_mean"),
        ({"timestep_spacing": "lead"}, r"'lead'.*did you mean 'leading'"),
        ({"beta_schedule": "lineer"}, r"'lineer'.*did you mean 'linear'.*trained_betas"),
        ({"beta_start": -1e-4}, r"beta_start.*-0.0001"),
        ({"beta_start": -1e-4, "beta_schedule": "scaled_linear"}, r"beta_start.*-0.0001"),
        ({"beta_start": "1e-4"}, r"beta_start.*'1e-4'"),
        ({"beta_start": 0}, r"strictly between 0 and 1, got 0.0 at t=0"),
        ({"beta_end": 1.0}, r"strictly between 0 and 1, got 1.0 at t=999"),
        ({"beta_end": 2}, r"strictly between 0 and 1, got 1.00105.* at t=500"),
        ({"beta_end": float("nan")}, r"beta_end must be a number between 0 and 1, got nan"),
        ({"beta_start": float("nan"), "beta_schedule": "squaredcos_cap_v2"}, r"beta_start.*got nan"),
        ({"beta_start": float("inf")}, r"beta_start.*got inf"),
        ({"clip_sample_range": float("inf")}, r"clip_sample_range.*got inf.*clip_sample=False"),
        ({"clip_sample_range": float("nan")}, r"clip_sample_range.*got nan"),
        ({"sample_max_value": float("nan")}, r"sample_max_value.*got nan"),
        ({"dynamic_thresholding_ratio": float("nan")}, r"dynamic_thresholding_ratio.*nan"),
        ({"trained_betas": [0.1, 0.2]}, r"2 values for num_train_timesteps=1000"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, r"got 1.5 at t=1"),
        ({"trained_betas": "none"}, r"trained_betas.*'none'"),
        ({"num_train_timesteps": 0}, r"num_train_timesteps.*got 0"),
        ({"num_train_timesteps": 10.0}, r"num_train_timesteps.*got 10.0"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr=False"),
        ({"steps_offset": 0.5}, r"steps_offset.*0.5"),
        ({"clip_sample_range": 0}, r"clip_sample_range.*got 0"),
        ({"clip_sample_range": "1"}, r"clip_sample_range must be a number above 0 and finite, got '1'"),
        ({"clip_sample": "false"}, r"clip_sample must be True or False, got 'false'"),
        ({"num_train_timesteps": "1000"}, r"num_train_timesteps.*got '1000'"),
        ({"dynamic_thresholding_ratio": 99.5}, r"dynamic_thresholding_ratio.*99.5"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler(**config)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (-1, r"t=-1 is outside.*0 to 999"),
        (1000, r"t=1000 is outside.*0 to 999"),
        (3.0, r"whole number, got 3.0"),
        (None, r"whole number, got None"),
        ([3, 4], r"whole number, got \[3, 4\]"),
        (np.array([3, 4]), r"whole number, got array"),
        (torch.tensor(3.0), r"whole numbers, got a tensor of torch.float32"),
        (torch.tensor([3, -1]), r"t=-1 is outside"),
        (torch.tensor([3, 1000]), r"t=1000 is outside"),
        (torch.tensor([1, 2, 3]), r"shape \(3,\) for a batch of 2"),
        (torch.tensor([[1, 2]]), r"shape \(1, 2\) for a batch of 2"),
    ],
)
def test_bad_timesteps(t, message):
    scheduler = DDPMScheduler()
    x = images(2, 3, 4, 4)
    for call in (
        lambda: scheduler.step(x, t, x),
        lambda: scheduler.add_noise(x, x, t),
        lambda: scheduler.get_velocity(x, x, t),
        lambda: scheduler.q_mean_variance(x, t),
        lambda: scheduler.q_posterior(x, x, t),
        lambda: scheduler.p_mean_variance(x, t, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_timestep_outside_the_sampling_chain():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    x = images(2, 3, 4, 4)
    for t in (555, torch.tensor(555), torch.tensor([900, 555])):
        with pytest.raises(ValueError, match=r"t=555 is not among the 10 timesteps.*set_timesteps"):
            scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="t=555 is not among"):
        scheduler.previous_timestep(555)
    with pytest.raises(ValueError, match=r"whole number, got 3.5"):
        scheduler.previous_timestep(3.5)


X = images(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.add_noise(X, X[:, :1], 5), r"\(2, 3, 4, 4\) and \(2, 1, 4, 4\)"),
        (lambda s: s.add_noise(X, torch.cat([X, X]), 5), r"\(2, 3, 4, 4\) and \(4, 3, 4, 4\)"),
        (lambda s: s.get_velocity(X, X[:, :1], 5), r"\(2, 3, 4, 4\) and \(2, 1, 4, 4\)"),
        (lambda s: s.q_posterior(X, X[..., :2], 5), r"\(2, 3, 4, 4\) and \(2, 3, 4, 2\)"),
        (lambda s: s.get_target(X, X[:1], 5), r"\(2, 3, 4, 4\) and \(1, 3, 4, 4\)"),
        (lambda s: s.add_noise((X * 255).byte(), X, 5), r"torch.uint8.*x / 127.5 - 1"),
        (lambda s: s.step(X[:1], 5, X), r"\(2, 3, 4, 4\).*got \(1, 3, 4, 4\)"),
        (lambda s: s.step(X[:, :1], 5, X), r"\(2, 3, 4, 4\).*got \(2, 1, 4, 4\)"),
        (lambda s: s.step(X.flatten(), 5, X), r"\(2, 3, 4, 4\).*got \(96,\)"),
        (lambda s: s.step(X.flatten(), 5, X.flatten()), r"\[B, C, ...\], got \(96,\)"),
        (lambda s: s.step(torch.cat([X, X], 1), 5, X), r"'learned' or 'learned_range'"),
        (lambda s: s.step(X, 5, X, generator=[torch.Generator()] * 3), r"got 3 generators for a batch of 2"),
        (lambda s: s.step(X, 0, X, generator=[torch.Generator()]), r"got 1 generators for a batch of 2"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call(DDPMScheduler())


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_too_few_channels_for_a_learned_variance(variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type)
    for call in (lambda: scheduler.step(X, 5, X), lambda: scheduler.p_mean_variance(X, 5, X)):
        with pytest.raises(ValueError, match=rf"'{variance_type}'.*out_channels=6"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either"),
        ({"num_inference_steps": 5, "timesteps": [5]}, "not both"),
        ({"num_inference_steps": 0}, r"between 1 and the 1000 steps of the chain, got 0"),
        ({"num_inference_steps": -3}, r"got -3"),
        ({"num_inference_steps": 1001}, r"got 1001"),
        ({"num_inference_steps": 2.5}, r"whole number, got 2.5"),
        ({"num_inference_steps": torch.tensor(2.5)}, r"whole number, got tensor"),
        ({"timesteps": []}, r"empty.*for example"),
        ({"timesteps": 5}, r"list of whole numbers, got 5"),
        ({"timesteps": [5, 5]}, r"5 is followed by 5.*sorted"),
        ({"timesteps": [5, 7]}, r"5 is followed by 7.*sorted"),
        ({"timesteps": [5, -1]}, r"timestep -1 is outside"),
        ({"timesteps": [1000, 5]}, r"timestep 1000 is outside.*0 to 999"),
        ({"timesteps": [5.5, 1]}, r"whole number, got 5.5"),
        ({"timesteps": torch.tensor([[5, 1]])}, r"whole number"),
    ],
)
def test_bad_set_timesteps(arguments, message):
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert len(scheduler.timesteps) == 1000  # as it was


def test_an_offset_beyond_the_schedule():
    with pytest.raises(ValueError, match=r"timestep 1000 is outside.*steps_offset=1"):
        DDPMScheduler(steps_offset=1).set_timesteps(1000)
    assert spaced("leading", 10, steps_offset=1) == spaced("leading", 10, StockDDPMScheduler, steps_offset=1)


@pytest.mark.parametrize("schedule", ["linear", "quad", "warmup10", "sigmoid"])
def test_betas_in_single_precision_give_tables_in_double(schedule):
    ends = {"beta_start": np.float32(1e-4), "beta_end": np.float32(0.02)}
    table = DDPMScheduler(num_train_timesteps=20, beta_schedule=schedule, **ends).alpha_bar
    plain = {name: float(value) for name, value in ends.items()}
    assert table.dtype == np.float64
    assert (table == DDPMScheduler(num_train_timesteps=20, beta_schedule=schedule, **plain).alpha_bar).all()


def test_a_whole_configuration_that_is_put_there_is_checked():
    scheduler = DDPMScheduler(num_train_timesteps=10)
    config = {**scheduler.config, "prediction_type": "flow_prediction"}
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(config)  # as pipelines of diffusers do
    x = torch.zeros(1, 1, 2, 2)
    for use in (lambda: scheduler.get_target(x, x, 3), lambda: scheduler.step(x, 3, x)):
        with pytest.raises(ValueError, match="unknown prediction_type 'flow_prediction'"):
            use()


@pytest.mark.parametrize("config", [{"beta_schedule": "jsd"}, {"rescale_betas_zero_snr": True}])
def test_epsilon_from_where_nothing_is_left_of_x_0(config):
    scheduler = DDPMScheduler(**config)
    for t in (999, torch.tensor([5, 999])):
        with pytest.raises(ValueError, match=r"t=999.*v_prediction"):
            scheduler.step(X, t, X)
    assert torch.isfinite(scheduler.step(X, 998, X).prev_sample).all()
    other = DDPMScheduler(**config, prediction_type="v_prediction")
    assert torch.isfinite(other.step(X, 999, X).prev_sample).all()


def test_a_schedule_whose_alpha_bar_underflows():
    """0.1^1000 is 0 in float64; a prediction of x_0 still has a posterior there, over few steps too."""
    config = {"beta_schedule": "const", "beta_end": 0.9}
    with pytest.raises(ValueError, match=r"alpha_bar vanishes at t=999"):
        DDPMScheduler(**config).step(X, 999, X)
    scheduler = DDPMScheduler(**config, prediction_type="sample")
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        assert torch.isfinite(scheduler.step(X, t, X).prev_sample).all()


def test_presets():
    assert DDPMScheduler.from_preset("cifar10").config.variance_type == "fixed_large"
    assert DDPMScheduler.from_preset("cifar10", variance_type="fixed_small").config.variance_type == "fixed_small"
    with pytest.raises(ValueError, match=r"'cifar'.*did you mean 'cifar10'"):
        DDPMScheduler.from_preset("cifar")
