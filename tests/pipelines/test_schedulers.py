"""Every sampler, any number of steps: what the pipeline does about stock's timesteps."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import gaussian_pipeline, make_small_unet
from oracles import GaussianData

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.pipelines.schedulers import set_timesteps, takes_timesteps, use_timesteps
from ddpm_hf.sampling.generation import SAMPLERS, with_sampler
from ddpm_hf.utils.errors import UserError

DATA = GaussianData(mean=0.2, std=0.4, betas=np.linspace(1e-4, 0.02, 1000))
CHOSEN = [90, 41, 17, 6, 1]


def pipeline(**settings):
    settings = {"num_train_timesteps": 100, "beta_end": 0.2, **settings}
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler(**settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_has_a_chain_of_any_number_of_steps(sampler, spacing):
    """From the noise on, K different timesteps, each at less noise than the one before."""
    scheduler = with_sampler(pipeline(), sampler, timestep_spacing=spacing).scheduler
    refused = []
    for K in range(1, 101):
        try:
            set_timesteps(scheduler, K)
        except UserError as error:
            refused.append(str(error))
            continue
        timesteps = scheduler.timesteps
        assert len(timesteps) == (2 * K - 1 if sampler == "heun" else K)
        assert len(timesteps.unique()) == K
        assert (timesteps.diff() <= 0).all()
        assert 0 <= timesteps.min() <= timesteps.max() < 100  # stock's Heun takes fractions for linspace
        if sampler in ("dpmsolver++", "unipc", "deis", "sa_solver"):
            assert len(scheduler.sigmas) == K + 1
            assert (scheduler.sigmas.diff() < 0).all()
    assert len(refused) <= (0 if spacing in (None, "trailing") else 3)  # with one to three steps
    advice = "use timestep_spacing='trailing'"
    assert all("starts from noise at t=" in sentence and sentence.endswith(advice) for sentence in refused)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 60, 99, 100])
def test_images_of_any_number_of_steps(sampler, steps):
    images = with_sampler(pipeline(), sampler)(seeds=[0, 1], num_inference_steps=steps, output_type="pt").images
    assert images.isfinite().all()
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DDIMParallelScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 600, 999, 1000])
def test_ddim_goes_from_each_timestep_to_the_next(kind, spacing, steps):
    """Against Song et al. 2021, Eq. 12, written out for Gaussian data, for which the best epsilon is linear."""
    pipe = gaussian_pipeline(kind(1000, clip_sample=False, timestep_spacing=spacing, beta_start=1e-4), DATA)
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    if (spacing == "leading" and steps <= 3) or (spacing == "linspace" and steps == 1):
        with pytest.raises(UserError, match="starts from noise"):
            list(pipe.denoise(x, num_inference_steps=steps))
        return
    *_, last = pipe.denoise(x, num_inference_steps=steps)
    zero, one = last.prev_sample.flatten().double().tolist()
    mean, variance = DATA.ddim(pipe.scheduler.timesteps.tolist())
    assert (zero, (one - zero) ** 2) == (pytest.approx(mean, abs=1e-4), pytest.approx(variance, rel=1e-3, abs=1e-6))
    assert pipe.scheduler.num_inference_steps == steps


def test_ddim_with_noise_goes_from_each_timestep_to_the_next():
    """With eta = 1 it is the ancestral chain with beta-tilde (Song et al. 2021, Section 4.1)."""
    pipe = gaussian_pipeline(diffusers.DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing"), DATA)
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    *_, last = pipe.denoise(x, torch.Generator().manual_seed(1), num_inference_steps=7, eta=1.0)
    mean, variance = DATA.reverse_moments(pipe.scheduler.timesteps.tolist(), large=False)[-1]
    error = (variance / len(x)) ** 0.5
    assert abs(last.prev_sample.mean().item() - mean) < 4 * error
    assert last.prev_sample.var().item() == pytest.approx(variance, rel=4 * (2 / len(x)) ** 0.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_saved_timesteps_are_those_of_the_chain(sampler, tmp_path):
    pipe = pipeline()
    pipe.scheduler.register_to_config(_timesteps={"5": CHOSEN})
    pipe.save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    best = with_sampler(pipe, sampler, timestep_spacing="best")
    seen = [step.timestep for step in best.progressive(seeds=[0], num_inference_steps=5)]
    assert list(dict.fromkeys(seen)) == CHOSEN
    assert best.settings["scheduler"]["timesteps"] == {"5": CHOSEN}
    with pytest.raises(UserError, match="for 4 steps; it has those for 5 steps: run ddpm-hf best_timesteps"):
        best(seeds=[0], num_inference_steps=4)
    with pytest.raises(UserError, match="it has none: run ddpm-hf best_timesteps --num_inference_steps 4"):
        with_sampler(pipeline(), sampler, timestep_spacing="best")(seeds=[0], num_inference_steps=4)
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    stock.scheduler.set_timesteps(timesteps=CHOSEN)
    assert stock.scheduler.timesteps.tolist() == CHOSEN
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_timesteps"] == {"5": CHOSEN}


def test_a_solver_given_timesteps_is_stocks_where_both_can():
    """UniPC has no argument for timesteps: what is set instead is what it makes of its own spacing."""
    config = {"timestep_spacing": "trailing", "num_train_timesteps": 100}
    for kind in (diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler, diffusers.SASolverScheduler):
        stock, ours = kind(**config), kind(**config)
        stock.set_timesteps(20)
        use_timesteps(ours, stock.timesteps.tolist())
        torch.testing.assert_close(ours.sigmas, stock.sigmas)
        assert torch.equal(ours.timesteps, stock.timesteps)


def test_which_of_stocks_schedulers_take_timesteps():
    """As docs/timesteps.md says."""
    named = ("DDPM", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete", "HeunDiscrete", "LCM", "TCD")
    for name in named:
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        scheduler.set_timesteps(timesteps=[900, 400, 150])
        assert scheduler.timesteps.unique().tolist() == [150, 400, 900]
        assert takes_timesteps(scheduler)
    for name in ("DDIM", "UniPCMultistep", "DEISMultistep", "SASolver", "PNDM", "EulerAncestralDiscrete"):
        with pytest.raises(TypeError):
            getattr(diffusers, f"{name}Scheduler")().set_timesteps(timesteps=[900, 400, 150])
    with pytest.raises(UserError, match="PNDMScheduler takes no timesteps; use the ddpm, ddim or dpmsolver"):
        use_timesteps(diffusers.PNDMScheduler(), [900, 400])


def test_a_second_order_solver_starts_from_an_image_with_its_first_half():
    """It comes to each timestep twice; the second time is no place to start."""
    pipe = with_sampler(pipeline(clip_sample=False), "heun")
    image = torch.full((1, 8, 8), 0.7)
    seen = []
    options = {"image": image, "seeds": [0], "num_inference_steps": 10, "output_type": "pt"}
    for strength in (0.05, 0.3, 0.35, 1.0):
        pipe(strength=strength, callback_on_step_end=lambda p, i, t, tensors: seen.append((i, t)) or {}, **options)
        assert seen[0][0] % 2 == 0
        seen.clear()
    assert torch.allclose(pipe(strength=0.0, **options).images[0], image, atol=1e-6)


def test_samplers_take_the_models_values_although_other_classes_have_other_defaults():
    for sampler in SAMPLERS:
        scheduler = with_sampler(DDPMPipeline(make_small_unet(), DDPMScheduler()), sampler).scheduler
        config = scheduler.config
        assert (config.beta_start, config.beta_end, config.timestep_spacing) == (1e-4, 0.02, "leading")


def test_a_spacing_taken_instead_does_not_start_where_nothing_is_left():
    """`leading` starts late, and `trailing` starts where alpha_bar is 0."""
    pipe = with_sampler(pipeline(rescale_betas_zero_snr=True), "ddim")
    with pytest.raises(UserError, match="alpha_bar vanishes at t=99, where 'epsilon' says nothing about x_0"):
        pipe(seeds=[0], num_inference_steps=2)
