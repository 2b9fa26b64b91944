"""The recipes beside the paper's own numbers, typed in a second time from the paper."""

import dataclasses

import numpy as np
import pytest
import torch

from ddpm_hf import PRESETS, DDPMScheduler, TrainingConfig, UNet2DModel, get_preset

PAPER = {
    # name: batch, learning rate, updates, dropout, flips, size, first width (Section 4, Appendix B, Table 3)
    "cifar10": (128, 2e-4, 800_000, 0.1, True, 32, 128),
    "celebahq256": (64, 2e-5, 500_000, 0.0, True, 256, 128),
    "lsun_bedroom256": (64, 2e-5, 2_400_000, 0.0, False, 256, 128),
    "lsun_bedroom256_large": (64, 2e-5, 1_150_000, 0.0, False, 256, 192),
    "lsun_church256": (64, 2e-5, 1_200_000, 0.0, True, 256, 128),
    "lsun_cat256": (64, 2e-5, 1_800_000, 0.0, True, 256, 128),
}


# Table 2: prediction, loss, variance; Inception score and FID, where training was stable.
TABLE_2 = {
    "cifar10_ablation_mu_learned": ("posterior_mean", "vlb", "learned", 7.28, 23.69),
    "cifar10_ablation_mu_fixed": ("posterior_mean", "vlb", "fixed_large", 8.06, 13.22),
    "cifar10_ablation_mu_mse": ("posterior_mean", "simple", "fixed_large", None, None),
    "cifar10_ablation_epsilon_learned": ("epsilon", "vlb", "learned", None, None),
    "cifar10_ablation_epsilon_fixed": ("epsilon", "vlb", "fixed_large", 7.67, 13.51),
    "cifar10": ("epsilon", "simple", "fixed_large", 9.46, 3.17),
}
ABLATIONS = [name for name in TABLE_2 if name != "cifar10"]
TABLE_3 = {"lsun_bedroom256": 6.36, "lsun_bedroom256_large": 4.90, "lsun_church256": 7.89, "lsun_cat256": 19.75}


def test_there_are_these_presets():
    assert set(PRESETS) == {"digits", "cifar10_fast", *PAPER, *TABLE_2}
    assert all(preset.name == name and get_preset(name) is preset for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PAPER)
def test_values_are_the_papers(name):
    preset = get_preset(name)
    batch, learning_rate, updates, dropout, flips, size, width = PAPER[name]
    assert (preset.total_batch_size, preset.learning_rate, preset.max_train_steps) == (batch, learning_rate, updates)
    assert (preset.random_flip, preset.unet["dropout"], preset.unet["sample_size"]) == (flips, dropout, size)
    multiples = (1, 2, 2, 2) if size == 32 else (1, 1, 2, 2, 4, 4)
    assert preset.unet["block_out_channels"] == tuple(width * multiple for multiple in multiples)
    # "Adam ... standard values", "EMA ... decay factor of 0.9999", L_simple (Algorithm 1), and only in the code:
    # 5000 updates of warm-up, gradients clipped at 1.
    assert (preset.ema_decay, preset.ema_warmup) == (0.9999, False)
    assert (preset.loss, preset.timestep_sampling) == ("simple", "uniform")
    assert (preset.lr_warmup_steps, preset.lr_scheduler, preset.max_grad_norm) == (5000, "constant", 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_the_papers_process(name):
    scheduler = DDPMScheduler.from_preset(name)
    assert len(scheduler._betas) == 1000
    assert scheduler._betas[0] == pytest.approx(1e-4, rel=1e-15)
    assert scheduler._betas[-1] == pytest.approx(0.02, rel=1e-15)
    assert np.diff(scheduler._betas).std() < 1e-15  # a straight line
    assert scheduler.config.clip_sample is True
    # run_cifar.py samples with fixedlarge, the 256x256 scripts with the posterior's variance
    prediction, _, variance, _, _ = TABLE_2.get(name, ("epsilon", "", "fixed_large", 0, 0))
    assert scheduler.config.prediction_type == prediction
    assert scheduler.config.variance_type == ("fixed_small" if "256" in name else variance)


@pytest.mark.parametrize("name", TABLE_2)
def test_the_ablation_is_table_2(name):
    preset, cifar10 = get_preset(name), get_preset("cifar10")
    prediction, loss, variance, score, fid = TABLE_2[name]
    assert (preset.scheduler["prediction_type"], preset.loss) == (prediction, loss)
    assert preset.scheduler["variance_type"] == variance
    assert preset.paper.get("is_inception_float", (None,))[0] == score
    assert preset.paper.get("fid_inception_train_float", (None,))[0] == fid
    assert ("unstable" in preset.source) == (score is None)
    same = "total_batch_size learning_rate lr_warmup_steps max_train_steps ema_decay random_flip dataset"
    assert all(getattr(preset, field) == getattr(cifar10, field) for field in same.split())
    with torch.device("meta"):
        unet = UNet2DModel.from_preset(name)
    assert sum(p.numel() for p in unet.parameters()) == (35_749_766 if variance == "learned" else 35_746_307)


def test_the_fast_recipe_has_the_papers_network_and_process():
    fast, cifar10 = get_preset("cifar10_fast"), get_preset("cifar10")
    assert {**fast.unet, "dropout": 0.1} == dict(cifar10.unet)  # which holds no weights
    assert (fast.scheduler, fast.loss, fast.total_batch_size) == (cifar10.scheduler, "simple", 128)
    assert (fast.lr_scheduler, fast.timestep_sampling, dict(fast.paper)) == ("cosine", "stratified", {})


def test_the_other_numbers_are_the_papers():
    assert {name: get_preset(name).paper["fid_inception_train_uint8"][0] for name in TABLE_3} == TABLE_3
    assert get_preset("cifar10").paper["fid_inception_test_float"] == (5.24,)
    nll = {name: get_preset(name).paper for name in ("cifar10", "cifar10_ablation_epsilon_fixed")}
    assert [(paper["bits_per_dim"], paper["bits_per_dim_train"]) for paper in nll.values()] == [
        ((3.75,), (3.72,)),
        ((3.70,), (3.69,)),
    ]
    assert not get_preset("digits").paper


def test_a_run_may_take_another_variance_than_an_ablation():
    preset = "cifar10_ablation_mu_learned"
    recipe = TrainingConfig(preset=preset, variance_type="fixed_large").resolved_preset()
    assert recipe.unet["out_channels"] == 3
    assert TrainingConfig(preset=preset).resolved_preset().unet["out_channels"] == 6


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_network(name):
    with torch.device("meta"):
        unet = UNet2DModel.from_preset(name)
    channels = 1 if name == "digits" else 3
    outputs = 2 * channels if "learned" in name else channels
    assert (unet.config.in_channels, unet.config.out_channels) == (channels, outputs)
    for argument, value in get_preset(name).unet.items():
        assert getattr(unet.config, argument) == value


@pytest.mark.parametrize("name", [*PAPER, *ABLATIONS])
def test_nothing_is_left_to_a_default_that_stock_could_change(name):
    """Where the official network needs another value than stock's, the preset writes it out."""
    preset = get_preset(name)
    written = {
        "downsample_padding": 0,
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "layers_per_block": 2,
    }
    assert {key: preset.unet[key] for key in written} == written
    assert {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "variance_type"} <= set(preset.scheduler)


def test_presets_cannot_be_changed():
    preset = get_preset("cifar10")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.learning_rate = 1.0
    with pytest.raises(TypeError):
        preset.unet["dropout"] = 0.5
    with pytest.raises(TypeError):
        PRESETS["mine"] = preset
    overridden = UNet2DModel.from_preset("digits", dropout=0.3)
    assert overridden.config.dropout == 0.3
    assert get_preset("digits").unet["dropout"] == 0.0


@pytest.mark.parametrize("name", ["cifar", "CIFAR10", "", None, ["cifar10"]])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(
        ValueError,
        match=r"unknown preset .*the presets are digits, cifar10, cifar10_fast, cifar10_ablation_mu_learned",
    ):
        get_preset(name)
    with pytest.raises(ValueError, match=r"did you mean 'lsun_cat256'"):
        get_preset("lsun_cats256")
