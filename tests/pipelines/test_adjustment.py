"""Epsilon scaling and guidance by a second network: against the weights, formulas by hand, and each other."""

import pytest
import torch
from conftest import make_small_unet
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.evaluation.epsilon_scaling import scaled_model
from ddpm_hf.pipelines.inference import InferenceOptions, optimize_for_inference
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.utils.errors import UserError

CALL = {"seeds": [3, 4], "num_inference_steps": 6, "output_type": "pt"}


def pipeline(seed=0, network=None, **settings):
    pipe = DDPMPipeline(make_small_unet(seed, **(network or {})), DDPMScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captured(pipe):
    """The pipeline as on a GPU: steps are graphs (here without CUDA)."""
    optimize_for_inference(pipe, options=InferenceOptions(captured=True))
    return pipe


# ------------------------------------------------------------------ epsilon scaling


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_a_divided_last_layer_is_the_same_as_the_option(sampler):
    pipe = pipeline(variance_type="fixed_large")
    option = with_sampler(pipe, sampler)
    weights = with_sampler(scaled_model(pipe, 1.03, sampler, 6), sampler)
    for one in (option, weights):
        one.set_progress_bar_config(disable=True)
    expected = weights(**CALL).images
    assert (option(epsilon_scale=1.03, **CALL).images - expected).abs().max() < 1e-5
    assert (option(**CALL).images - expected).abs().max() > 1e-3
    x_t, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 9, 500, 999])
    with torch.no_grad():
        whole, divided = pipe.unet(x_t, t).sample, weights.unet(x_t, t).sample
    assert (whole / 1.03 - divided).abs().max() < 6e-7 * whole.abs().max()


def test_a_learned_variance_is_not_divided():
    pipe = pipeline(network={"out_channels": 2}, variance_type="learned_range")
    scaled = scaled_model(pipe, 1.05, "ddpm", 6)
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, divided = pipe.unet(x_t, 5).sample, scaled.unet(x_t, 5).sample
    assert torch.allclose(divided[:, :1], whole[:, :1] / 1.05, atol=1e-6)
    assert torch.equal(divided[:, 1:], whole[:, 1:])
    scaled.set_progress_bar_config(disable=True)
    assert (pipe(epsilon_scale=1.05, **CALL).images - scaled(**CALL).images).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_what_is_predicted_does_not_matter(kind, variance_type):
    """A network that says the same noise as another one, in other words, is scaled to the same images."""
    network = {"out_channels": 2 if variance_type == "learned_range" else 1}
    pipe, other = (pipeline(0, network, prediction_type=k, variance_type=variance_type) for k in ("epsilon", kind))
    alpha_bar = torch.from_numpy(pipe.scheduler.alpha_bar)
    predict = pipe.unet.forward

    def forward(x_t, t, class_labels=None):
        """Written from the definitions: x_0 (Eq. 15), v (Salimans & Ho 2022), mu (Eq. 11)."""
        output, t = predict(x_t, t).sample.double(), int(t)
        eps, a, before = output[:, :1], alpha_bar[t], alpha_bar[t - 1] if t else torch.tensor(1.0).double()
        x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        beta = 1 - a / before
        made = {
            "sample": x_0,
            "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x_0,
            "posterior_mean": (x_t - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt(),
        }[kind]
        return UNet2DOutput(sample=torch.cat([made, output[:, 1:]], dim=1).float())

    other.unet.forward = forward
    for scale in (1.05, (1.02, 3e-5)):
        expected = pipe(epsilon_scale=scale, **CALL).images
        assert (other(epsilon_scale=scale, **CALL).images - expected).abs().max() < 2e-3  # x_0 is large near t = T
        assert (pipe(**CALL).images - expected).abs().max() > 0.01


def test_a_ramp_divides_by_its_value_at_every_timestep():
    pipe = with_sampler(pipeline(clip_sample=False), "ddim")
    pipe.set_progress_bar_config(disable=True)
    made = list(pipe.progressive(seeds=[5], num_inference_steps=5, epsilon_scale=(1.1, -1e-4)))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    x_t = made[0].sample
    for step in made:
        with torch.no_grad():
            eps = pipe.unet(x_t, step.timestep).sample / (1.1 - 1e-4 * step.timestep)
        x_t = scheduler.step(eps, step.timestep, x_t).prev_sample
        assert (x_t - step.prev_sample).abs().max() < 1e-4


# ------------------------------------------------------------------ autoguidance


def test_guidance_is_the_line_through_both_networks():
    pipe, guide = pipeline(0), pipeline(1, {"block_out_channels": (8, 16)})
    model, worse = pipe(**CALL).images, guide(**CALL).images
    pipe.guide = guide
    assert torch.equal(pipe(**CALL).images, model)
    assert torch.equal(pipe(guidance_scale=1.0, **CALL).images, model)
    assert torch.equal(pipe(guidance_scale=0.0, **CALL).images, worse)
    (first, *_) = pipe.progressive(seeds=[3], num_inference_steps=6, guidance_scale=2.0)
    with torch.no_grad():
        good, bad = (p.unet(first.sample, first.timestep).sample for p in (pipe, guide))
    # Eq. 15 of 2 good - bad, and clipped
    a = float(pipe.scheduler.alpha_bar[first.timestep])
    x_0 = ((first.sample - (1 - a) ** 0.5 * (bad + 2 * (good - bad))) / a**0.5).clamp(-1, 1)
    assert (first.pred_original_sample - x_0).abs().max() < 1e-4
    assert not guide.unet.training


def test_only_the_interval_is_guided():
    pipe, guide = pipeline(0), pipeline(1)
    pipe.guide = guide
    calls = []
    guide.unet.register_forward_pre_hook(lambda module, inputs: calls.append(int(inputs[1])))
    plain = list(pipe.progressive(seeds=[3], num_inference_steps=10))
    made = list(pipe.progressive(seeds=[3], num_inference_steps=10, guidance_scale=3.0, guidance_interval=(200, 600)))
    expected = [step.timestep for step in made if 200 <= step.timestep <= 600]
    assert calls == expected
    assert 0 < len(expected) < 10
    for before, now in zip(plain, made, strict=True):
        assert torch.equal(before.prev_sample, now.prev_sample) == (now.timestep > 600)


@pytest.mark.parametrize("interval", [None, (200, 600)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_captured_chain_is_guided_and_scaled_too(interval, sampler):
    pipe = pipeline(0)
    pipe.guide = pipeline(1, {"block_out_channels": (8, 16)})
    pipe = with_sampler(pipe, sampler)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "guidance_interval": interval, "epsilon_scale": (1.02, 1e-5)}
    plain = pipe(**CALL, **options).images
    captured(pipe)
    assert pipe.guide.network is not pipe.guide.unet
    for _ in range(2):
        assert (pipe(**CALL, **options).images - plain).abs().max() < 1e-4
    other = pipe(**CALL, **{**options, "epsilon_scale": None}).images  # not what was captured for another scale
    assert (other - plain).abs().max() > 1e-3
    alone = pipe(**{**CALL, "seeds": [4]}, **options).images
    assert (alone - plain[1:]).abs().max() < 1e-4


def test_classes_are_guided_by_a_network_with_or_without_them():
    classes = {"num_class_embeds": 4, "_null_class": 3}
    pipe, options = pipeline(0, classes), {**CALL, "class_labels": [0, 2]}
    plain = pipe(**options).images
    for network in (classes, {}):
        guide = pipeline(1, network)
        pipe.guide = guide
        assert torch.equal(pipe(guidance_scale=1.0, **options).images, plain)
        own = options if network else CALL
        assert torch.equal(pipe(guidance_scale=0.0, **options).images, guide(**own).images)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (make_small_unet(), "guide must be a DDPMPipeline, got UNet2DModel"),
        (pipeline(network={"in_channels": 3, "out_channels": 3}), r"makes images of \(3, 8, 8\)"),
        (pipeline(network={"sample_size": 16}), r"makes images of \(1, 16, 16\)"),
        (pipeline(prediction_type="sample"), "predicts 'sample', the model 'epsilon'"),
        (pipeline(beta_end=0.03), "another noise schedule"),
        (pipeline(num_train_timesteps=500), "another noise schedule"),
        (pipeline(network={"num_class_embeds": 4}), "must have the model's classes, or none: it has 0..3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_guide_that_does_not_fit_is_one_sentence(guide, message):
    pipe = pipeline()
    pipe.guide = guide
    with pytest.raises(UserError, match=message):
        pipe(guidance_scale=2.0, **CALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (1, 5)}, "guidance_interval goes with a guidance_scale"),
        ({"guidance_scale": 2, "guidance_interval": (5, 1)}, "0 <= LOW <= HIGH, .*, got 5 and 1"),
        ({"guidance_scale": 2, "guidance_interval": (1000, 2000)}, "with LOW below T = 1000, got 1000 and 2000"),
        ({"guidance_scale": 2, "guidance_interval": 5}, "two timesteps LOW and HIGH, got 5"),
        ({"guidance_scale": float("nan")}, "must be a finite number, got nan"),
        ({"epsilon_scale": 0}, "must stay above 0, got 0 at t=0"),
        ({"epsilon_scale": (1, -0.01)}, "got 1 at t=0 and -8.99 at t=999"),
        ({"epsilon_scale": float("nan")}, "a number b, or b and k"),
        ({"epsilon_scale": (1, 2, 3)}, r"a number b, or b and k of .*, got \(1, 2, 3\)"),
    ],
)
def test_values_out_of_range_are_one_sentence(options, message):
    pipe = pipeline()
    pipe.guide = pipeline(1)
    with pytest.raises(UserError, match=message):
        pipe(**CALL, **options)


def test_epsilon_is_not_scaled_where_nothing_is_left_of_the_image():
    pipe = pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="leaves something of the image"):
        pipe(epsilon_scale=1.01, **CALL)


def test_nothing_is_scaled_twice():
    pipe = scaled_model(pipeline(), 1.02, "ddim", 20)
    with pytest.raises(UserError, match=r"divided by 1\.02 already"):
        pipe(epsilon_scale=1.01, **CALL)
    with pytest.raises(UserError, match=r"divided by 1\.02, for ddim over 20 steps already"):
        scaled_model(pipe, 1.01, "ddim", 20)
    with pytest.raises(UserError, match=r"predicts 'v_prediction'.*epsilon_scale instead"):
        scaled_model(pipeline(prediction_type="v_prediction"), 1.01, "ddim", 20)
