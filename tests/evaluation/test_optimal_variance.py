"""The measured error of a network, and what it is good for."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import DIGITS_MODEL, gaussian_pipeline, make_small_unet
from oracles import GaussianData

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data.datasets import load_images
from ddpm_hf.data.tensors import ImageDataset, to_model_range
from ddpm_hf.diffusion.likelihood import stratified_bits_per_dim
from ddpm_hf.evaluation.optimal_variance import prediction_error


def digits(split, count):
    data = load_images(dataset="digits", split=split, channels=1, resolution=(8, 8))
    return data.subset(torch.arange(count))


def test_a_perfect_network_has_the_error_of_the_closed_form():
    data = GaussianData(mean=0.1, std=0.25, betas=np.linspace(1e-4, 0.02, 1000))
    pixels = 0.1 + 0.25 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = ImageDataset(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None, "gaussian")
    error = prediction_error(gaussian_pipeline(DDPMScheduler(clip_sample=False), data), images)
    expected = torch.tensor([data.unknown_of_x_0(t) for t in range(1000)])
    # A mean of n squares of Gaussians is off by sqrt(2/n) of itself; four of these, and the rounding of pixel values.
    assert ((error - expected).abs() < 4 * (2 / pixels.numel()) ** 0.5 * expected + (1 / 127.5) ** 2 / 12).all()


def test_batches_do_not_matter_and_bad_images_are_refused(small_pipeline):
    few = DDPMPipeline(small_pipeline.unet, DDPMScheduler(num_train_timesteps=20))
    error = prediction_error(few, digits("train", 7), batch_size=7)
    assert torch.allclose(error, prediction_error(few, digits("train", 7), batch_size=2), rtol=1e-4)
    with pytest.raises(ValueError, match="no images"):
        prediction_error(few, digits("train", 0))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        prediction_error(few, ImageDataset(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, "x"))
    classes = DDPMPipeline(make_small_unet(num_class_embeds=3), DDPMScheduler(num_train_timesteps=5))
    with pytest.raises(ValueError, match="have no labels"):
        prediction_error(classes, ImageDataset(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, "x"))


def test_held_out_digits_cost_the_fewest_bits_with_it():
    """The bound of a trained network on images it has not seen, with the same draws for every variance."""
    pipe = DDPMPipeline.from_pretrained(DIGITS_MODEL)
    error = prediction_error(pipe, digits("train", 4))
    x_0 = to_model_range(digits("validation", 24).images)

    def bound(variance_type):
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
        scheduler.set_prediction_error(error)
        return stratified_bits_per_dim(pipe.unet, scheduler, x_0, num_evaluations=50).mean

    assert bound("optimal") < min(bound("fixed_small"), bound("fixed_large")) - 0.05


def test_the_command_rewrites_the_scheduler_only(tmp_path, capsys):
    model = tmp_path / "model"
    DDPMPipeline(make_small_unet(), DDPMScheduler(num_train_timesteps=20)).save_pretrained(model)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    command = ["optimal_variance", "--model", str(model), "--dataset", "digits", "--num_images", "3"]
    assert main([*command, "--keep_variance_type"]) == 0
    assert DDPMPipeline.from_pretrained(model).scheduler.variance_type == "fixed_small"
    assert main(command) == 0
    assert "the error on 3 images" in capsys.readouterr().out
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert changed == [model / "scheduler" / "scheduler_config.json"]
    assert {path for path in model.rglob("*") if path.is_file()} == set(before)
    assert diffusers.DDPMPipeline.from_pretrained(model).scheduler.config.variance_type == "fixed_small"
    pipe = DDPMPipeline.from_pretrained(model)
    assert pipe.scheduler.variance_type == "optimal"
    measured = json.loads(changed[0].read_text())["_prediction_error"]
    assert measured == pytest.approx(prediction_error(pipe, digits("train", 3)).tolist(), rel=1e-6)
    seeds = ["--seeds", "0-1", "--num_inference_steps", "5", "--output", str(tmp_path / "out.npz")]
    assert main(["sample", "--model", str(model), *seeds]) == 0

    assert main([*command, "--output", str(tmp_path / "new")]) == 0
    assert DDPMPipeline.from_pretrained(tmp_path / "new").scheduler.variance_type == "optimal"
    assert "# new" in (tmp_path / "new" / "README.md").read_text()
    assert main([*command[:2], "org/model", *command[3:]]) == 2
    assert "give --output" in capsys.readouterr().err
    shutil.rmtree(model)
    unet = make_small_unet(out_channels=2)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, variance_type="learned_range")).save_pretrained(model)
    assert main(command) == 2
    assert "--keep_variance_type" in capsys.readouterr().err
