"""Training losses against the official outputs, and what a perfect network and its gradients look like."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import (
    CASES,
    PREDICTION_TYPE,
    TIMESTEPS,
    VARIANCE_TYPE,
    decoder_log_likelihood,
    official,
    official_kl_rounding,
    tanh_cdf,
)

from ddpm_hf import DDPMScheduler
from ddpm_hf.diffusion.objectives import HYBRID_WEIGHT, OBJECTIVES, hybrid_loss, simple_loss, variational_bound_loss
from ddpm_hf.diffusion.scheduling_ddpm import FIXED_VARIANCES, LEARNED_VARIANCES, PREDICTION_TYPES

T_STEPS = torch.tensor([0, 1, 500, 999])


class Says:
    """A network that always gives the same output, and remembers what it was asked."""

    def __init__(self, output: torch.Tensor):
        self.output = output

    def __call__(self, x_t, t, **kwargs):
        self.x_t, self.t, self.kwargs = x_t, t, kwargs
        return UNet2DOutput(sample=self.output)


def batch(dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 256, (4, 2, 4, 4), generator=g).to(dtype) / 127.5 - 1
    return x_0, torch.randn(x_0.shape, generator=g, dtype=dtype)


def perfect(scheduler, x_0, noise, t, raw_variance: float = 0.0) -> torch.Tensor:
    target = scheduler.get_target(x_0, noise, t)
    if scheduler.variance_type in LEARNED_VARIANCES:
        return torch.cat([target, torch.full_like(target, raw_variance)], dim=1)
    return target


# ---------------------------------------------------------------------- the official implementation's outputs


@pytest.mark.parametrize(("mean", "var", "t"), CASES)
def test_official_losses(mean, var, t):
    prefix, timesteps = f"{mean}_{var}_{t}_", torch.tensor(TIMESTEPS[t])
    scheduler = DDPMScheduler(variance_type=VARIANCE_TYPE[var], prediction_type=PREDICTION_TYPE[mean])
    arguments = Says(official(prefix + "model_output")), scheduler, official("x0"), timesteps, official("noise")
    torch.testing.assert_close(simple_loss(*arguments), official(prefix + "loss_mse"), rtol=2e-5, atol=0)
    error = (variational_bound_loss(*arguments) - official(prefix + "loss_kl")).abs()
    tolerance = 2e-5 * official(prefix + "loss_kl") + official_kl_rounding(prefix, timesteps)
    assert (error <= tolerance).all(), (error, tolerance)


def test_official_loss_with_a_learned_variance():
    scheduler = DDPMScheduler(variance_type="learned")
    network = Says(official("learned_out"))
    loss = variational_bound_loss(network, scheduler, official("x0"), official("learned_t"), official("noise"))
    torch.testing.assert_close(loss, official("learned_loss_kl"), rtol=2e-5, atol=0)
    torch.testing.assert_close(network.x_t, official("learned_xt"), rtol=0, atol=5e-7)


@pytest.mark.parametrize("wrong", ["fixed_small", "learned_range"])
def test_another_variance_fails_the_official_losses(wrong):
    prefix, timesteps = "eps_fixedlarge_37_", torch.tensor(TIMESTEPS["37"])
    output = official(prefix + "model_output")
    if wrong == "learned_range":
        output = torch.cat([output, torch.zeros_like(output)], dim=1)
    loss = variational_bound_loss(
        Says(output), DDPMScheduler(variance_type=wrong), official("x0"), timesteps, official("noise")
    )
    assert ((loss / official(prefix + "loss_kl") - 1).abs() > 2e-4).all()


# ---------------------------------------------------------------------- a perfect network


@pytest.mark.parametrize("variance_type", FIXED_VARIANCES + LEARNED_VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_has_no_simple_loss(prediction_type, variance_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = batch()
    network = Says(perfect(scheduler, x_0, noise, T_STEPS))
    assert torch.equal(simple_loss(network, scheduler, x_0, T_STEPS, noise), torch.zeros(4))
    worse = Says(network.output + 0.1)
    loss = simple_loss(worse, scheduler, x_0, T_STEPS, noise)
    torch.testing.assert_close(loss, torch.full((4,), 0.01), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", FIXED_VARIANCES + LEARNED_VARIANCES)
def test_the_bound_of_a_perfect_prediction_is_that_of_the_variances(prediction_type, variance_type):
    """With the means right, only the variances' part of the KL is left; at t = 0 the decoder at its best mean."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = batch(torch.float64)
    raw = -0.3 if variance_type == "learned_range" else -5.0
    network = Says(perfect(scheduler, x_0, noise, T_STEPS, raw))
    loss = variational_bound_loss(network, scheduler, x_0, T_STEPS, noise)

    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    for i, t in enumerate(T_STEPS.tolist()):
        s = max(t, 1)  # at t = 0 the fixed variances are beta_tilde of t = 1
        small = np.log(betas[s] * (1 - alpha_bar[s - 1]) / (1 - alpha_bar[s]))
        log_variance = {
            "fixed_small": small,
            "fixed_large": np.log(betas[t]) if t else small,
            "learned": raw,
            "learned_range": 0.35 * np.log(betas[t]) + 0.65 * small,
        }[variance_type.removesuffix("_log")]
        nats = 0.5 * (log_variance - small - 1 + np.exp(small - log_variance))
        if t == 0:
            image = x_0[i].numpy()
            nats = -decoder_log_likelihood(image, image, np.full(image.shape, log_variance / 2), tanh_cdf).mean()
        assert loss[i].item() == pytest.approx(nats / math.log(2), rel=1e-6, abs=1e-9)


def test_the_bound_weighs_epsilon_as_eq_12():
    """L_{t-1} - C = beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) ||eps - eps_theta||^2 for fixed variances."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    x_0, noise = batch(torch.float64)
    error = torch.full_like(x_0, 0.2)
    t = torch.tensor([1, 37, 500, 999])
    beta_tilde = betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    for variance_type, variance in (("fixed_small", beta_tilde), ("fixed_large", betas[t])):
        scheduler = DDPMScheduler(variance_type=variance_type)
        wrong, right = (
            variational_bound_loss(Says(noise + e), scheduler, x_0, t, noise) for e in (error, torch.zeros_like(x_0))
        )
        weight = betas[t] ** 2 / (2 * variance * (1 - betas[t]) * (1 - alpha_bar[t]))
        expected = torch.from_numpy(weight * 0.2**2 / math.log(2))
        torch.testing.assert_close(wrong - right, expected, rtol=1e-7, atol=1e-12)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("variance_type", LEARNED_VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_in_the_hybrid_loss_the_bound_trains_the_variance_only(prediction_type, variance_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = batch()
    raw = -0.3 if variance_type == "learned_range" else -5.0
    # Close to perfect: off by many bins, the decoder's probability lies on its floor, where its gradient is 0.
    output = perfect(scheduler, x_0, noise, T_STEPS, raw) + 1e-3

    def gradient(loss):
        leaf = output.clone().requires_grad_()
        values = loss(Says(leaf), scheduler, x_0, T_STEPS, noise)
        return torch.autograd.grad(values.sum(), leaf)[0].chunk(2, dim=1), values

    (simple, no_variance), simple_values = gradient(simple_loss)
    (bound_mean, bound_variance), bound_values = gradient(variational_bound_loss)
    (hybrid_mean, hybrid_variance), hybrid_values = gradient(hybrid_loss)
    assert not no_variance.any()
    assert bound_mean.any()
    assert bound_variance.flatten(1).any(1).all()
    torch.testing.assert_close(hybrid_mean, simple)
    # lambda = 0.001 times the whole bound, which is T times the term at a uniform t
    torch.testing.assert_close(hybrid_variance, HYBRID_WEIGHT * 1000 * bound_variance)
    torch.testing.assert_close(hybrid_values, simple_values + HYBRID_WEIGHT * 1000 * bound_values)


@pytest.mark.parametrize("loss", ["simple", "vlb"])
@pytest.mark.parametrize("variance_type", FIXED_VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradients_are_finite(loss, prediction_type, variance_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = batch()
    leaf = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    values = OBJECTIVES[loss](Says(leaf), scheduler, x_0, T_STEPS, noise)
    assert values.shape == (4,)
    gradient = torch.autograd.grad(values.sum(), leaf)[0]
    assert torch.isfinite(gradient).all()
    assert gradient[1:].flatten(1).any(1).all()


# ---------------------------------------------------------------------- dtypes and arguments


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_low_precision_output_gives_a_float32_loss(loss):
    scheduler = DDPMScheduler(variance_type="learned_range")
    x_0, noise = batch()
    output = perfect(scheduler, x_0, noise, T_STEPS) + 0.1
    low = OBJECTIVES[loss](Says(output.bfloat16()), scheduler, x_0, T_STEPS, noise)
    assert low.dtype == torch.float32
    same = OBJECTIVES[loss](Says(output.bfloat16().float()), scheduler, x_0, T_STEPS, noise)
    assert torch.equal(low, same)


def test_float64_stays_float64():
    x_0, noise = batch(torch.float64)
    loss = simple_loss(Says(noise + 1e-10), DDPMScheduler(), x_0, T_STEPS, noise)
    torch.testing.assert_close(loss, torch.full((4,), 1e-20, dtype=torch.float64), rtol=1e-3, atol=0)


def test_keyword_arguments_reach_the_network():
    x_0, noise = batch()
    for name in ("simple", "vlb"):
        network = Says(noise)
        OBJECTIVES[name](network, DDPMScheduler(), x_0, T_STEPS, noise, class_labels=torch.arange(4))
        assert network.kwargs["class_labels"].tolist() == [0, 1, 2, 3]
        assert network.t is T_STEPS


def test_one_t_for_all():
    x_0, noise = batch()
    for name in ("simple", "vlb"):
        for t in (0, 37):
            values = OBJECTIVES[name](Says(noise + 0.1), DDPMScheduler(), x_0, t, noise)
            expected = OBJECTIVES[name](Says(noise + 0.1), DDPMScheduler(), x_0, torch.full((4,), t), noise)
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_bad_input():
    x_0, noise = batch()
    with pytest.raises(ValueError, match=r"'fixed_small'.*'learned_range'.*'simple'"):
        hybrid_loss(Says(noise), DDPMScheduler(), x_0, T_STEPS, noise)
    with pytest.raises(ValueError, match=r"'learned'.*out_channels=4"):
        hybrid_loss(Says(noise), DDPMScheduler(variance_type="learned"), x_0, T_STEPS, noise)
    with pytest.raises(ValueError, match=r"\(4, 2, 4, 4\) and \(1, 2, 4, 4\)"):
        simple_loss(Says(noise), DDPMScheduler(), x_0, T_STEPS, noise[:1])
    with pytest.raises(ValueError, match=r"shape \(3,\) for a batch of 4"):
        simple_loss(Says(noise), DDPMScheduler(), x_0, T_STEPS[:3], noise)
    with pytest.raises(ValueError, match=r"t=1000 is outside"):
        variational_bound_loss(Says(noise), DDPMScheduler(), x_0, T_STEPS + 1, noise)
    with pytest.raises(ValueError, match=r"\(4, 2, 4, 4\).*got \(4, 2, 4, 2\)"):
        simple_loss(Says(noise[..., :2]), DDPMScheduler(), x_0, T_STEPS, noise)
