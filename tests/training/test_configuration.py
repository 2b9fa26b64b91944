"""Training settings: presets and what overrides them, and how a batch is cut."""

import resource
import signal

import diffusers
import pytest
import yaml
from conftest import make_small_unet

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.cli import parse_training_config
from ddpm_hf.presets import get_preset
from ddpm_hf.training.configuration import TrainingConfig


def test_the_preset_is_the_default():
    config = TrainingConfig(preset="cifar10")
    assert config.resolved_preset() == get_preset("cifar10")
    assert config.images_given() == {"dataset_name": "cifar10"}
    assert TrainingConfig(preset="digits").images_given() == {"dataset": "digits"}
    assert TrainingConfig(preset="digits", train_data_dir="x").images_given() == {"train_data_dir": "x"}


def test_the_preset_that_is_left_out_is_that_of_the_digits_for_the_digits():
    assert TrainingConfig().preset == TrainingConfig(train_data_dir="digits").preset == "cifar10"
    assert TrainingConfig(dataset="digits").resolved_preset() == get_preset("digits")
    assert TrainingConfig(dataset="digits", preset="cifar10").preset == "cifar10"
    assert parse_training_config(["--dataset", "digits"]).preset == "digits"


def test_flags_override_the_preset():
    config = TrainingConfig(preset="cifar10", learning_rate=1e-3, dropout=0.0, resolution=64, ema_max_decay=0.99)
    recipe = config.resolved_preset()
    assert (recipe.learning_rate, recipe.ema_decay, recipe.lr_warmup_steps) == (1e-3, 0.99, 5000)
    assert (recipe.unet["dropout"], recipe.unet["sample_size"]) == (0.0, 64)


@pytest.mark.parametrize(
    ("settings", "processes", "plan"),
    [
        ({}, 1, (128, 1, 128)),
        ({}, 4, (32, 1, 128)),
        ({"train_batch_size": 16}, 1, (16, 8, 128)),
        ({"train_batch_size": 16}, 2, (16, 4, 128)),
        ({"gradient_accumulation_steps": 4}, 2, (16, 4, 128)),
        ({"train_batch_size": 6, "gradient_accumulation_steps": 2}, 3, (6, 2, 36)),
        ({"total_batch_size": 64, "train_batch_size": 64}, 1, (64, 1, 64)),
    ],
)
def test_batch_plan(settings, processes, plan):
    assert TrainingConfig(preset="cifar10", **settings).batch_plan(processes) == plan


@pytest.mark.parametrize(
    ("settings", "processes", "evaluation", "grid"),
    [
        ({"preset": "cifar10"}, 1, 256, 64),
        ({"preset": "cifar10", "train_batch_size": 4}, 1, 256, 64),
        ({"preset": "digits"}, 2, 256, 64),
        ({"preset": "cifar10", "resolution": 64, "train_batch_size": 8}, 1, 64, 64),
        ({"preset": "lsun_church256"}, 8, 8, 8),  # 256 x 256: as many as one process trains on at a time
        ({"preset": "lsun_church256", "train_batch_size": 2}, 1, 4, 4),  # as many pixels as 256 images of 32 x 32
        ({"preset": "lsun_church256", "train_batch_size": 2, "eval_batch_size": 1}, 1, 1, 1),
        ({"preset": "digits", "eval_batch_size": 300}, 1, 300, 300),
    ],
)
def test_images_at_a_time_where_nothing_is_trained(settings, processes, evaluation, grid):
    config = TrainingConfig(**settings)
    assert config.evaluation_batch(config.resolved_preset().unet, processes) == evaluation
    assert config.evaluation_batch(config.resolved_preset().unet, processes, most=64) == grid


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({"train_batch_size": 48}, 1),
        ({}, 3),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2, "total_batch_size": 17}, 1),
    ],
)
def test_a_total_batch_size_that_cannot_be_reached(settings, processes):
    with pytest.raises(ValueError, match="total"):
        TrainingConfig(preset="cifar10", **settings).batch_plan(processes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", 0.0),
        ("max_train_steps", 0),
        ("train_batch_size", -3),
        ("lr_warmup_steps", -1),
        ("dropout", 1.0),
        ("ema_max_decay", 1.0),
        ("validation_split", -0.1),
        ("mixed_precision", "fp8"),
        ("loss", "l1"),
        ("lr_scheduler", "cosin"),
        ("sampler", "euler"),
        ("timestep_sampling", "importance"),
        ("eval_num_evaluations", 5),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("max_grad_norm", float("nan")),
        ("lr_warmup_steps", float("nan")),
        ("dropout", float("nan")),
        ("class_dropout", float("nan")),
        ("ema_max_decay", float("nan")),
        ("validation_split", float("nan")),
        ("value_range", [0.0, float("nan")]),
        ("value_range", [float("-inf"), 1.0]),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}.*{value}"):
        TrainingConfig(preset="digits", **{name: value})


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddpm", DDPMScheduler),
        ("ddim", diffusers.DDIMScheduler),
        ("dpmsolver++", diffusers.DPMSolverMultistepScheduler),
        ("unipc", diffusers.UniPCMultistepScheduler),
        ("heun", diffusers.HeunDiscreteScheduler),
        ("deis", diffusers.DEISMultistepScheduler),
        ("sa_solver", diffusers.SASolverScheduler),
    ],
)
def test_a_run_draws_its_samples_by_any_sampler(sampler, scheduler):
    config = TrainingConfig(preset="digits", sampler=sampler, ddpm_num_inference_steps=7)
    pipe = DDPMPipeline(make_small_unet(), DDPMScheduler())
    options = config.sampling(pipe)
    assert type(options.pipeline(pipe).scheduler) is scheduler
    assert options.chain["num_inference_steps"] == 7


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"'cifar' \(did you mean 'cifar10'\?\)"):
        TrainingConfig(preset="cifar")


def test_a_full_disk_leaves_the_configuration_that_was_there(tmp_path):
    path = tmp_path / "c.yaml"
    TrainingConfig(preset="digits").save(path)
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the error instead of the signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OSError, match="File too large"):
            TrainingConfig(preset="cifar10").save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before


def test_saved_configuration_reads_back(tmp_path):
    config = TrainingConfig(preset="digits", learning_rate=1e-4, random_flip=True)
    config.save(tmp_path / "c.yaml")
    assert TrainingConfig(**yaml.safe_load((tmp_path / "c.yaml").read_text())) == config
