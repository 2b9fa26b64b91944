"""The best few timesteps."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import gaussian_pipeline, make_small_unet
from oracles import GaussianData

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data.tensors import ImageDataset, to_model_range
from ddpm_hf.diffusion.likelihood import bits_per_dim
from ddpm_hf.evaluation.features import make_extractor
from ddpm_hf.evaluation.optimal_variance import prediction_error
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.timesteps import best_for_bound, best_for_samples, power_spaced, shortest_chain, step_costs
from ddpm_hf.sampling.generation import with_sampler

T = 9
BETAS = np.linspace(1e-3, 0.7, T)


def pixels(count):
    x = 0.1 + 0.3 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None, "gaussian")


def test_the_cost_of_a_step_is_the_kl_of_its_posterior():
    """KL(N(mu_tilde, beta_tilde) || N(mu, sigma^2)), written out with Eq. 7's coefficients of the subsequence."""
    alpha_bar = np.cumprod(1 - BETAS)
    error = np.linspace(0.01, 0.4, T)
    cost = step_costs(alpha_bar, error)
    for t in range(T):
        for s in range(T):
            if s >= t:
                assert cost[t, s] == np.inf
                continue
            beta = 1 - alpha_bar[t] / alpha_bar[s]
            beta_tilde = (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * beta
            gap = alpha_bar[s] * beta**2 / (1 - alpha_bar[t]) ** 2 * error[t]  # E (mu_tilde - mu)^2
            variance = beta_tilde + gap
            kl = 0.5 * (math.log(variance / beta_tilde) - 1 + (beta_tilde + gap) / variance)
            assert cost[t, s] == pytest.approx(kl / math.log(2), rel=1e-9)


@pytest.mark.parametrize("K", range(1, T + 1))
def test_dynamic_programming_finds_what_trying_all_finds(K):
    draw = np.random.default_rng(K)
    for _ in range(5):
        cost = np.where(np.tri(T, k=-1, dtype=bool), draw.random((T, T)), np.inf)
        prior, decoder = draw.random((2, T))

        def value(chain, cost=cost, prior=prior, decoder=decoder):
            return prior[chain[0]] + sum(cost[t, s] for t, s in itertools.pairwise(chain)) + decoder[chain[-1]]

        expected = min(itertools.combinations(range(T - 1, -1, -1), K), key=value)
        found, bound = shortest_chain(cost, prior, decoder, K)
        assert found == list(expected)
        assert bound == pytest.approx(value(expected))


class Worse(GaussianData):
    """Predictions that are half as far from the mean as the best ones, so that few steps cost something."""

    def expected_noise(self, t):
        slope, offset = super().expected_noise(t)
        return 0.5 * slope, 0.5 * offset


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_best_timesteps_of_a_network_have_the_lowest_bound_of_all(K):
    """Each chain's bound evaluated term by term, on the same images."""
    scheduler = DDPMScheduler(T, trained_betas=BETAS.tolist(), variance_type="optimal")
    pipe, data = gaussian_pipeline(scheduler, Worse(0.1, 0.3, BETAS)), pixels(64)
    error = prediction_error_of(pipe, data)
    found, bound = best_for_bound(pipe, data, error, K)
    scheduler.set_prediction_error(error)

    def value(chain):
        return bits_per_dim(pipe.unet, scheduler, to_model_range(data.images), timesteps=chain).total_bpd.mean().item()

    bounds = {chain: value(list(chain)) for chain in itertools.combinations(range(T - 1, -1, -1), K)}
    # the draws of x_t differ between the measured costs and a chain's own bound
    assert bounds[tuple(found)] <= min(bounds.values()) + 0.02
    assert bound == pytest.approx(bounds[tuple(found)], abs=0.02)
    assert bounds[tuple(found)] < np.median(list(bounds.values()))


def prediction_error_of(pipe, data):
    fixed = DDPMScheduler(T, trained_betas=BETAS.tolist())
    return prediction_error(DDPMPipeline(pipe.unet, fixed), data)


def test_power_spacings():
    assert power_spaced(1000, 5, 1) == [999, 749, 500, 250, 0]
    assert power_spaced(1000, 5, 2) == [999, 562, 250, 62, 0]
    assert power_spaced(1000, 1, 2) == [999]
    for K in (2, 9, 10):
        chosen = power_spaced(10, K, 3)
        assert len(set(chosen)) == K
        assert chosen == sorted(chosen, reverse=True)
        assert (chosen[0], chosen[-1]) == (9, 0)


def test_the_search_finds_timesteps_whose_samples_are_nearer():
    """DDIM's variance for Gaussian data is too small with few steps, and depends on where they are."""
    scheduler = DDPMScheduler(50, beta_end=0.3, clip_sample=False, timestep_spacing="linspace")
    data = GaussianData(0.1, 0.3, scheduler._betas)
    pipe = with_sampler(gaussian_pipeline(scheduler, data), "ddim")
    extractor = make_extractor("pixels", pipe.image_shape)
    real = extractor(pixels(400).images)["features"]
    options = EvaluationOptions(num_samples=300, num_inference_steps=3, batch_size=300, seed=1)
    lines = []
    found, best, own = best_for_samples(pipe, real, extractor, options, 25, lines.append)
    assert len(found) == 3
    assert best < own
    assert lines[0].startswith("1 of 25: distance ")
    assert abs(data.ddim(found)[1] / 0.09 - 1) < abs(data.ddim([49, 24, 0])[1] / 0.09 - 1)


def test_the_command_writes_timesteps_that_every_sampler_takes(tmp_path, capsys):
    model = tmp_path / "model"
    DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=12)).save_pretrained(model)
    command = ["best_timesteps", "--model", str(model), "--dataset", "digits", "--num_images", "3"]
    assert main([*command, "--num_inference_steps", "4"]) == 0
    printed, bars = capsys.readouterr()
    assert "bits/dim on these 3 images, with --variance_type optimal" in printed
    assert "ends of chains: 100%" in bars
    search = ["--objective", "samples", "--sampler", "ddim", "--features", "pixels", "--num_samples", "4"]
    many = [*command[:-1], "8", "--num_inference_steps", "3", *search, "--num_trials", "4"]
    assert main(many) == 0
    printed, bars = capsys.readouterr()
    assert "distance to validation images on other seeds" in printed
    assert "| 6/6 [" in bars  # 4 trials, and 2 on other seeds
    config = DDPMPipeline.from_pretrained(model).scheduler.config
    assert len(config["_timesteps"]["4"]) == 4
    assert config.variance_type == "fixed_small"
    out = ["--seeds", "0", "--num_inference_steps", "4", "--timestep_spacing", "best", "--output"]
    for sampler in ("ddpm", "unipc"):
        file = str(tmp_path / f"{sampler}.npz")
        assert main(["sample", "--model", str(model), "--sampler", sampler, *out, file]) == 0
    capsys.readouterr()
    flags = ["--model", str(model), "--dataset", "digits", "--num_images", "2", "--num_inference_steps", "4"]
    flags += ["--variance_type", "optimal", "--timestep_spacing", "best", "--cache_dir", str(tmp_path / "cache")]
    assert main(["evaluate", *flags]) == 0
    assert "bits_per_dim_4_steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give the number of timesteps as --num_inference_steps"),
        (["--num_inference_steps", "13"], "between 1 and the 12 steps"),
        (["--num_inference_steps", "3", "--sampler", "ddim"], "leave out --sampler, or take --objective samples"),
        (["--num_inference_steps", "3", "--objective", "fid"], "fid"),
        (["--num_inference_steps", "3", "--model", "org/model"], "'org/model' is no published model here"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, flags, words):
    model = tmp_path / "model"
    DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=12)).save_pretrained(model)
    assert main(["best_timesteps", "--model", str(model), "--dataset", "digits", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_learned_variance_has_no_table_of_costs():
    unet = make_small_unet(out_channels=2)
    pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=5, variance_type="learned_range"))
    with pytest.raises(ValueError, match="predicts its own variance; use objective='samples'"):
        best_for_bound(pipe, pixels(2), torch.zeros(5), 2)
