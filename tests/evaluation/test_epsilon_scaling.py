"""The scale of epsilon: found where it is known, written for stock, refused where it means nothing."""

import json

import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, gaussian_pipeline, make_small_unet
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import GaussianData
from programs import run_program

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data.tensors import ImageDataset
from ddpm_hf.evaluation.epsilon_scaling import exposure_bias, find_epsilon_scale, norm_mismatch
from ddpm_hf.evaluation.report import EvaluationReport
from ddpm_hf.hub.model_card import ModelFacts
from ddpm_hf.sampling.generation import with_sampler
from ddpm_hf.utils.digests import weights_digest
from ddpm_hf.utils.errors import UserError

SAMPLING = ["--seeds", "0-3", "--num_inference_steps", "3"]


def wrong_by(factor, prediction_type="epsilon"):
    """A perfect network of Gaussian data but for its epsilon, whose sampler keeps q's marginals, and such images."""
    data = GaussianData(mean=0.1, std=0.25, betas=np.linspace(1e-4, 0.02, 1000))
    scheduler = DDPMScheduler(clip_sample=False, variance_type="optimal", prediction_type=prediction_type)
    scheduler.set_prediction_error([data.unknown_of_x_0(t) for t in range(1000)])
    pipe = gaussian_pipeline(scheduler, data)
    best, alpha_bar = pipe.unet.forward, torch.from_numpy(scheduler.alpha_bar)

    def forward(sample, timestep, class_labels=None):
        eps, signal = factor * best(sample, timestep).sample, float(alpha_bar[int(timestep)]) ** 0.5
        if prediction_type == "v_prediction":  # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 at this eps
            noise = (1 - signal**2) ** 0.5
            eps = signal * eps - noise * (sample - noise * eps) / signal
        return UNet2DOutput(sample=eps)

    pipe.unet.forward = forward
    pixels = 0.1 + 0.25 * torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe, ImageDataset(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None, "gaussian")


@pytest.mark.parametrize(("factor", "kind"), [(1.0, "epsilon"), (1.03, "epsilon"), (1.03, "v_prediction")])
def test_a_known_factor_is_found(factor, kind):
    pipe, images = wrong_by(factor, kind)
    options = {"num_inference_steps": 20, "batch_size": 400}
    b, k = find_epsilon_scale(norm_mismatch(pipe, images, **options), 1000)
    assert b == pytest.approx(factor, abs=0.004)
    assert k == 0
    before, after = (exposure_bias(pipe, images, epsilon_scale=scale, **options) for scale in (1.0, factor))
    assert before.timesteps == sorted(before.timesteps, reverse=True)
    # Of 25,600 pixels. Where the last step starts from, less noise than in q was left on purpose.
    assert (after.ratio[:-1] - 1).abs().max() < 0.02
    if factor > 1:  # too much noise is taken away, and too little is left for the network to find
        assert (before.ratio[1:] < 0.99).all()


def test_the_search_finds_a_minimum():
    def valley(scale):  # lambda(0) = 1.01, lambda(1000) = 1.03
        b, k = scale
        return (b - 1.01) ** 2 + (b + 1000 * k - 1.03) ** 2

    b, k = find_epsilon_scale(valley, 1000, ramp=True)
    assert (b, b + 1000 * k) == pytest.approx((1.01, 1.03), abs=0.002)
    assert find_epsilon_scale(valley, 1000) == (pytest.approx(1.02, abs=0.001), 0)
    with pytest.raises(UserError, match=r"no scale from 0\.95 to 1\.1 is the best: 1\.099 is at the end"):
        find_epsilon_scale(lambda scale: -scale[0], 1000)


# What stock makes of a model, in a process that cannot import this package.
STOCK = """
import sys
sys.modules["ddpm_hf"] = None
import diffusers, numpy, torch
pipe = diffusers.DDPMPipeline.from_pretrained(sys.argv[1])
pipe = diffusers.DDIMPipeline(**pipe.components)
options = {"num_inference_steps": 5, "use_clipped_model_output": True, "output_type": "np"}
made = pipe(4, torch.Generator().manual_seed(0), **options)
numpy.save(sys.argv[2], made.images)
"""


def test_the_command_writes_a_model_for_stock(tmp_path, capsys):
    model, scaled = DIGITS_MODEL, tmp_path / "scaled"
    command = ["scale_epsilon", "--model", str(model), "--sampler", "ddim", "--num_inference_steps", "5"]
    command += ["--dataset", "digits", "--num_images", "64", "--num_samples", "64"]
    assert main([*command, "--output", str(scaled)]) == 0
    printed, bars = capsys.readouterr()
    assert "search: 100%" in bars
    assert "| 11/11 [" in bars
    assert "| constant " in printed
    assert "norm of epsilon, training" in printed

    pipe = DDPMPipeline.from_pretrained(model)
    noted = DDPMPipeline.from_pretrained(scaled).unet.config["_epsilon_scale"]
    b = noted["b"]
    assert noted == {"b": b, "sampler": "ddim", "num_inference_steps": 5}
    assert 0.95 < b < 1.1
    assert ModelFacts.read(scaled).epsilon_scale == noted
    text = (scaled / "README.md").read_text()
    assert f"divided by {b:.4f}" in text
    assert "`ddim` over\n5 steps" in text

    (tmp_path / "stock.py").write_text(STOCK)
    done = run_program(tmp_path / "stock.py", scaled, tmp_path / "stock.npy")
    assert done.returncode == 0, done.stderr
    assert "_epsilon_scale" not in done.stderr  # no warning of an unknown key
    ours = with_sampler(pipe, "ddim")
    call = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    images = ours(4, epsilon_scale=b, **call).images
    assert np.abs(images - np.load(tmp_path / "stock.npy")).max() < 1 / 255

    folder = tmp_path / "samples"
    assert main(["sample", "--model", str(model), *SAMPLING, "--epsilon_scale", "1.02", "--output", str(folder)]) == 0
    assert json.loads((folder / "sampling.json").read_text())["epsilon_scale"] == 1.02
    for command_line, sentence in (
        ([*command, "--output", str(scaled)], "holds something else"),
        ([*command[:2], str(scaled), *command[3:], "--output", str(tmp_path / "twice")], "already; take the model"),
        ([*command[:5], *command[7:]], "give --num_inference_steps"),
        (["sample", "--model", str(model), *SAMPLING, "--output", str(folder)], "made with other epsilon_scale"),
        (
            ["sample", "--model", str(model), *SAMPLING, "--epsilon_scale", "1", "2", "3", "--output", "x.png"],
            "b and k",
        ),
    ):
        assert main(command_line) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_a_guide_is_recorded(tmp_path, capsys):
    model, guide, folder = (tmp_path / name for name in ("model", "guide", "samples"))
    for seed, path in enumerate((model, guide)):
        DDPMPipeline(make_small_unet(seed), DDPMScheduler()).save_pretrained(path)
    command = ["sample", "--model", str(model), *SAMPLING, "--output", str(folder)]
    guided = [*command, "--guide", str(guide), "--guidance_scale", "2"]
    interval = ["--guidance_interval", "100", "600"]
    assert main([*guided, *interval]) == 0
    noted = json.loads((folder / "sampling.json").read_text())
    assert noted["guide"] == weights_digest(make_small_unet(1))
    assert (noted["guidance_scale"], noted["guidance_interval"]) == (2, [100, 600])
    assert main([*guided, *interval]) == 0  # the same again is resumed
    for command_line, sentence in (
        ([*guided], "made with other guidance_interval"),
        ([*command, *interval], "--guidance_interval goes with a --guidance_scale"),
        ([*command, "--guidance_scale", "2"], "--guidance_scale needs --guide, a worse model, or"),
        ([*command, "--guide", str(guide)], "--guide needs --guidance_scale"),
        ([*command, "--guide", str(tmp_path / "none"), "--guidance_scale", "2"], "cannot load --guide"),
    ):
        capsys.readouterr()
        assert main(command_line) == 2
        assert sentence in capsys.readouterr().err

    numbers = ["--dataset", "digits", "--metrics", "fid", "--features", "pixels", "--num_samples", "24"]
    numbers += ["--num_inference_steps", "3", "--output", str(tmp_path / "report")]
    assert main(["evaluate", "--model", str(model), *numbers, *guided[-4:], *interval]) == 0
    settings = EvaluationReport.load(tmp_path / "report").settings["sampling"]
    assert (settings["guide"], settings["guidance_interval"]) == (noted["guide"], [100, 600])
