"""The configuration of a training run: flags and YAML keys, their defaults and their limits.

Names are those of diffusers' unconditional training example wherever it has the flag. `None` means the preset's value.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..presets import CHOICES, DISTILLATION, PRESETS, SAMPLERS, Preset, get_preset
from ..utils.errors import UserError
from ..utils.files import write_text

# What values a flag takes: a test of a value, and the words for it.
Limit = tuple[Callable[[Any], bool], str]
POSITIVE: Limit = (lambda value: 0 < value < math.inf, "must be positive")
NOT_NEGATIVE: Limit = (lambda value: 0 <= value < math.inf, "must not be negative")
FRACTION: Limit = (lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
EVEN: Limit = (lambda value: value > 0 and value % 2 == 0, "must be positive and even")
NORM: Limit = (lambda value: value > 0, "must be positive")  # infinity leaves gradients as they are
THREADS: Limit = (lambda value: 0 < value <= 4096, "must be between 1 and 4096")
NOT_EMPTY: Limit = (bool, "must not be empty")
SIZE: Limit = (
    lambda value: (len(value) == 2 and min(value) > 0) if isinstance(value, list) else value > 0,
    "takes one or two positive numbers",
)
RANGE: Limit = (
    lambda value: isinstance(value, list) and len(value) == 2 and -math.inf < value[0] < value[1] < math.inf,
    "takes two rising numbers, for example 0 1",
)

_PRESET = "what is left out is as in --preset"
_PRESETS = f"{', '.join(PRESETS)}; default: cifar10, or digits for --dataset digits"
_INIT_FROM = "fine-tune this model (a folder, a checkpoint, a name on the Hub), with its network and noise schedule"
_NEEDS = {"hub_model_id": "push_to_hub", "best_metric": "validation_steps", "class_dropout": "class_conditional"}
_TOTAL = "chosen to reach the total batch size if left out"
_AT_END, _SAMPLES, _EVALUATION = "only at the end if left out", "samples while training", "evaluation while training"
_INCEPTION = "Inception weights file; torch-fidelity's own if left out"
_MINUTES = "end the run inside this time, with its model and numbers; the learning rate falls to 0 (cosine)"
_BATCH = "images at a time in evaluations and grids; changes no number; 256 (grids: 64) if left out, fewer of images "
_BATCH += "larger than 32x32, but never fewer than a micro-batch of the training"
_PRECISION = "no, fp16 or bf16 for the network; default: the launcher's, else bf16 on GPUs that have it"


def one_of(*names: str) -> Limit:
    """Return the limit of a flag that takes one of some names."""
    return (lambda value: value in names), f"must be one of {', '.join(names)}"


def paper_value(name: str) -> str:
    """Return the values of a preset's field or argument in the paper's experiments (Table 2 aside), for help texts."""
    found: dict[str, list[str]] = {}
    large = [preset.name for preset in PRESETS.values() if preset.unet["sample_size"] == 256]
    for preset in (PRESETS[name] for name in ("cifar10", *large)):
        value = {**preset.unet, **preset.scheduler, **vars(preset)}[name]
        text = f"{value:g}" if isinstance(value, float) else str(value).lower()
        found.setdefault(text, []).append(preset.name)
    if len(found) == 1:
        return f"the paper: {next(iter(found))}"
    of = {text: "256x256" if names == large else ", ".join(names) for text, names in found.items()}
    return "the paper: " + "; ".join(f"{text} ({names})" for text, names in of.items())


def _flag(
    default: Any, help: str, limit: Limit | None = None, paper: str = "", group: str | None = None, repr: bool = True
) -> Any:
    """Return a field that is a flag; `paper` is for `paper_value`, `group` the title of it and those that follow."""
    text = f"{help}; {paper_value(paper)}" if paper else help
    return field(default=default, metadata={"help": text, "limit": limit, "group": group, "paper": paper}, repr=repr)


def _preset(name: str, help: str) -> Any:
    return _flag(None, help, one_of(*CHOICES[name]) if name in CHOICES else None, name)


def check_limits(config: Any) -> None:
    """Check the fields of a configuration against the limits of their flags, or raise UserError."""
    for flag in dataclasses.fields(config):
        value, limit = getattr(config, flag.name), flag.metadata["limit"]
        if value is not None and limit is not None and not limit[0](value):
            raise UserError(f"--{flag.name} {limit[1]}, got {value!r}")


def due(step: int, interval: int | None) -> bool:
    """Return whether what is done every `interval` updates (never for `None`) is due after update `step`."""
    return interval is not None and step % interval == 0


class TrainingError(UserError):
    """A run cannot continue; the message says why and what is left on disk."""


@dataclass(frozen=True)
class TrainingConfig:
    """One training run: each field is a flag and a YAML key. Raises UserError for values that cannot be taken."""

    not_flags: ClassVar[frozenset[str]] = frozenset()  # fields that are none
    defaults: ClassVar[Preset | None] = None  # what is left out, where there is no --preset

    preset: str = _flag(None, f"the experiment: {_PRESETS}", group=f"network and process; {_PRESET}")
    init_from: str | None = _flag(None, _INIT_FROM, NOT_EMPTY)
    dropout: float | None = _flag(None, "dropout in the residual blocks", FRACTION, paper="dropout")
    prediction_type: str | None = _preset("prediction_type", "epsilon, sample, v_prediction or posterior_mean")
    variance_type: str | None = _preset("variance_type", "fixed_small, fixed_large, learned or learned_range")
    class_conditional: bool = _flag(False, "train on the images' classes")
    class_dropout: float = _flag(0.0, "share of images trained without their class (for guidance)", FRACTION)

    dataset: str | None = _flag(None, "a built-in dataset: digits", group="images")
    dataset_name: str | None = _flag(None, "a dataset by Hub id or local path")
    dataset_config_name: str | None = _flag(None, "the configuration of --dataset_name")
    train_data_dir: str | None = _flag(None, "a folder of images; subfolders are classes")
    cache_dir: str | None = _flag(None, "where downloaded datasets are kept; default: the cache of datasets")
    image_column: str | None = _flag(None, "the dataset's column of images; detected if left out")
    label_column: str | None = _flag(None, "the dataset's column of classes; detected if left out")
    resolution: int | list[int] | None = _flag(None, "height and width, or one number", SIZE, paper="sample_size")
    center_crop: bool = _flag(True, "crop images of another shape in the middle; false: at random")
    random_flip: bool | None = _flag(None, "mirror images at random; default: the preset's", paper="random_flip")
    background: str = _flag("white", "colour under transparent pixels")
    value_range: list[float] | None = _flag(None, "the values of black and white in .npy arrays, such as 0 1", RANGE)
    array_layout: str | None = _flag(None, "HWC or CHW, for .npy arrays whose shape fits both", one_of("HWC", "CHW"))
    on_bad_image: str = _flag("error", "error, or skip: name unreadable images, omit them", one_of("error", "skip"))
    streaming: bool = _flag(False, "read the dataset from end to end, without keeping it")
    dataloader_num_workers: int = _flag(4, "threads that decode images which do not fit into memory", NOT_NEGATIVE)
    validation_split: float = _flag(0.0, "share of the images never trained on (digits has its own)", FRACTION)

    max_train_steps: int | None = _flag(None, "optimizer updates", POSITIVE, "max_train_steps", f"recipe; {_PRESET}")
    max_train_minutes: float | None = _flag(None, _MINUTES, POSITIVE)
    train_batch_size: int | None = _flag(None, f"images per process and micro-batch; {_TOTAL}", POSITIVE)
    total_batch_size: int | None = _flag(None, "images per update of all processes", POSITIVE, "total_batch_size")
    gradient_accumulation_steps: int | None = _flag(None, f"micro-batches per update; {_TOTAL}", POSITIVE)
    learning_rate: float | None = _flag(None, "peak learning rate of Adam", POSITIVE, paper="learning_rate")
    lr_scheduler: str | None = _preset("lr_scheduler", "constant, cosine or linear, after the warm-up")
    lr_warmup_steps: int | None = _flag(None, "updates of linear warm-up", NOT_NEGATIVE, paper="lr_warmup_steps")
    max_grad_norm: float | None = _flag(None, "larger gradients are scaled down", NORM, paper="max_grad_norm")
    ema_max_decay: float | None = _flag(None, "decay of the EMA weights", FRACTION, paper="ema_decay")
    posthoc_ema: bool = _flag(True, "keep what ddpm-hf ema makes averages of other lengths from, after the training")
    posthoc_ema_snapshots: int = _flag(3, "for that: snapshots on disk, each as large as the weights", POSITIVE)
    loss: str | None = _preset("loss", "simple (Eq. 14), vlb (the bound) or hybrid (learned variance)")
    timestep_sampling: str | None = _preset("timestep_sampling", "uniform, or stratified over each batch")
    seed: int = _flag(0, "seed of everything random")

    output_dir: str = _flag("ddpm-model", "where model and checkpoints go", NOT_EMPTY, group="output and checkpoints")
    checkpointing_steps: int = _flag(5000, "updates between checkpoints", POSITIVE)
    checkpoints_total_limit: int | None = _flag(None, "how many checkpoints to keep; all if left out", POSITIVE)
    resume_from_checkpoint: str | None = _flag(None, "latest, or a checkpoint's folder; if left out, a new run")
    dry_run: bool = _flag(False, "check images, network, memory, disk, Hub and time, then stop; writes nothing")

    save_images_steps: int | None = _flag(None, f"updates between grids; {_AT_END}", POSITIVE, group=_SAMPLES)
    num_sample_images: int = _flag(64, "images in a grid", POSITIVE)
    ddpm_num_inference_steps: int = _flag(1000, "sampler steps, for grids too", POSITIVE, "num_train_timesteps")
    sampler: str = _flag("ddpm", "for the same: ddpm is Algorithm 2; the paper", one_of(*SAMPLERS))

    validation_steps: int | None = _flag(None, f"updates between evaluations; {_AT_END}", POSITIVE, group=_EVALUATION)
    eval_metrics: str = _flag("nll", "what to measure, of nll (bits/dim), fid, is, kid, prc, sw, ...: nll,fid")
    eval_num_images: int = _flag(1000, "held-out images for bits/dim; 0 leaves it out", NOT_NEGATIVE)
    eval_num_evaluations: int = _flag(50, "network evaluations per image for bits/dim (stratified)", EVEN)
    eval_num_samples: int = _flag(5000, "samples for fid, is, kid, prc; the paper, at the end: 50000", POSITIVE)
    eval_features: str = _flag("inception", "what fid, kid and prc compare: inception, pixels, or a vision model")
    eval_inception_weights: str | None = _flag(None, _INCEPTION)
    eval_batch_size: int | None = _flag(None, _BATCH, POSITIVE)
    best_metric: str | None = _flag(None, "keep the model that is best by this number in best/: bits_per_dim, ...")

    mixed_precision: str | None = _flag(None, _PRECISION, one_of("no", "fp16", "bf16"), group="machine and trackers")
    num_cpu_threads: int | None = _flag(None, "CPU threads per process; default: an even share of the cores", THREADS)
    tf32: bool = _flag(False, "NVIDIA GPUs: faster float32 products with 10 bits of mantissa")
    compile: bool | None = _flag(None, "torch.compile the network; default: on NVIDIA GPUs")
    channels_last: bool | None = _flag(None, "channels_last memory layout; default: on NVIDIA GPUs")
    cuda_graphs: bool = _flag(True, "NVIDIA GPUs: launch an update as one captured graph")
    gradient_checkpointing: bool = _flag(False, "trade time for memory")
    report_to: str | None = _flag(
        None, "trackers by accelerate: tensorboard, trackio, wandb, ...; several as a,b; all; none"
    )
    logging_steps: int = _flag(10, "updates between the numbers that trackers get", POSITIVE)
    logging_dir: str = _flag("logs", "where trackers write, inside the output folder")

    push_to_hub: bool = _flag(False, "publish the model on the Hub, with every checkpoint and at the end", group="Hub")
    hub_model_id: str | None = _flag(None, "org/name on the Hub; the output folder's name if left out")
    hub_private_repo: bool = _flag(True, "false: publish for everybody to see")
    hub_token: str | None = _flag(None, "better: 'hf auth login' or HF_TOKEN; never saved", repr=False)
    license: str | None = _flag(None, "of the model, for its card, such as apache-2.0")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # what Python callers write naturally
            if isinstance(value, (Path, list, tuple)):
                plain = str(value) if isinstance(value, Path) else value[0] if len(value) == 1 else list(value)
                object.__setattr__(self, name, plain)
        if self.preset is None:  # nobody means the network of 32x32 colour images for 8x8 grey ones
            object.__setattr__(self, "preset", "digits" if self.dataset == "digits" else "cifar10")
        get_preset(self.preset)
        check_limits(self)
        for name, other in _NEEDS.items():
            if getattr(self, name) and not getattr(self, other):
                raise UserError(f"--{name} {getattr(self, name)} needs --{other}")

    @property
    def base(self) -> Preset:
        """The recipe before this run's changes."""
        return get_preset(self.preset)

    def resolved_preset(self, preset: Preset | None = None) -> Preset:
        """Return `preset` (default: the named one) with this run's changes; UserError: loss and variance differ."""
        preset = preset or self.base
        unet, scheduler = dict(preset.unet), dict(preset.scheduler)
        if self.resolution is not None:
            sizes = self.resolution if isinstance(self.resolution, list) else [self.resolution]
            unet["sample_size"] = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        if self.dropout is not None:
            unet["dropout"] = self.dropout
        names = ("prediction_type", "variance_type")
        scheduler |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        learned = "learned" in scheduler.get("variance_type", "")
        if learned or "learned" in preset.scheduler.get("variance_type", ""):
            unet["out_channels"] = (2 if learned else 1) * unet.get("in_channels", 3)
        changes = {name: value for name, value in vars(self).items() if name in vars(preset) and name != "dataset"}
        changes |= {"ema_decay": self.ema_max_decay}
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.max_train_minutes is not None and preset.lr_scheduler == "constant":
            changes = {"lr_scheduler": "cosine"} | changes
        recipe = dataclasses.replace(preset, **changes, unet=unet, scheduler=scheduler)
        if (recipe.loss == "simple") if learned else (recipe.loss == "hybrid"):
            advice = "take --loss hybrid or vlb for a learned one" if learned else "add --variance_type learned_range"
            what = f"does not go with --variance_type {scheduler['variance_type']}"
            raise UserError(f"--loss {recipe.loss} {what}; {advice}")
        return recipe

    def images_given(self) -> dict[str, Any]:
        """Return the flags that say where images come from; the preset's own dataset if none was given."""
        names = ("dataset", "dataset_name", "train_data_dir")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if not given and (default := self.base.dataset) is not None:
            return {"dataset" if default == "digits" else "dataset_name": default}
        return given

    def image_options(self) -> dict[str, Any]:
        """Return what `data.load_images` takes besides where the images are."""
        if "dataset" in self.images_given():
            return {"background": self.background}
        same_name = ("background", "on_bad_image", "streaming", "image_column", "label_column", "cache_dir")
        options = {name: getattr(self, name) for name in (*same_name, "array_layout")}
        options |= {"num_workers": self.dataloader_num_workers, "config_name": self.dataset_config_name}
        options |= {"crop": "center" if self.center_crop else "random"}
        return options | ({} if self.value_range is None else {"value_range": tuple(self.value_range)})

    def batch_plan(self, num_processes: int) -> tuple[int, int, int]:
        """Return images per micro-batch and process, micro-batches and images per update, or raise UserError."""
        per_process, accumulation = self.train_batch_size, self.gradient_accumulation_steps
        product = (per_process or 1) * (accumulation or 1) * num_processes
        whole = per_process is not None and accumulation is not None
        total = self.total_batch_size or (product if whole else self.base.total_batch_size)
        if total % product or (whole and total != product):
            names = ("train_batch_size", "gradient_accumulation_steps")
            factors = [f"--{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None]
            of = " x ".join([*factors, f"{num_processes} process(es)"])
            what = f"the total batch size {total} is not {'' if whole else 'a multiple of '}{product} = {of}"
            raise UserError(f"{what}; change one of them, or --total_batch_size")
        rest = total // product
        return per_process or rest, accumulation or (rest if per_process else 1), total

    def evaluation_batch(self, network: Mapping[str, Any], num_processes: int, most: int = 256) -> int:
        """Return the images at a time and process where nothing is trained: `most`, unless `eval_batch_size` is set.

        A micro-batch always fits: without gradients an image takes a small part of the memory.
        """
        if self.eval_batch_size is not None:
            return self.eval_batch_size
        size = network["sample_size"]
        pixels = size**2 if isinstance(size, int) else math.prod(size)
        return min(most, max(self.batch_plan(num_processes)[0], 256 * 32 * 32 // pixels, 1))

    def sampling(self, pipe: Any) -> Any:
        """Return the `SamplingOptions` of the run's samples; a distilled model has its own."""
        from ..sampling.generation import SamplingOptions

        if pipe.distilled_steps:
            return SamplingOptions()
        steps = min(self.ddpm_num_inference_steps, pipe.scheduler.config.num_train_timesteps)
        return SamplingOptions(self.sampler, num_inference_steps=steps)

    def public_values(self) -> dict[str, Any]:
        """Return all values of flags but the access token, for files and trackers."""
        private = {"hub_token", "dry_run", *self.not_flags}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in private}

    def save(self, path: Path) -> None:
        """Write the run's configuration as YAML that `--config` reads."""
        write_text(path, yaml.safe_dump(self.public_values(), sort_keys=False))


# What a teacher decides, and what a student has no use for: images, and the likelihood that it does not have.
_OF_TRAINING = """preset init_from dropout prediction_type variance_type class_conditional class_dropout dataset
dataset_name dataset_config_name train_data_dir cache_dir image_column label_column resolution center_crop random_flip
background value_range array_layout on_bad_image streaming dataloader_num_workers validation_split loss
timestep_sampling ddpm_num_inference_steps sampler validation_steps eval_metrics eval_num_images eval_num_evaluations
eval_num_samples eval_features eval_inception_weights best_metric"""


@dataclass(frozen=True)
class DistillationConfig(TrainingConfig):
    """One run of `ddpm-hf distill`: a training whose images are those that the teacher makes.

    Raises:
        UserError: As in `TrainingConfig`, and without a teacher.
    """

    not_flags: ClassVar[frozenset[str]] = frozenset(_OF_TRAINING.split())
    defaults: ClassVar[Preset | None] = DISTILLATION

    model: str | None = _flag(None, "the teacher: a folder, a checkpoint, or a name on the Hub", group="distillation")
    steps: int = _flag(4, "network evaluations of the student for an image", POSITIVE)
    teacher_steps: int = _flag(24, "network evaluations of the teacher for an image, a multiple of --steps", POSITIVE)
    num_trajectories: int = _flag(8192, "images that the teacher makes, before the training starts", POSITIVE)
    guidance_scale: float = _flag(1.0, "the teacher's classifier-free guidance, which the student learns", POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise UserError("--model names the teacher: the folder of a trained model, or its name on the Hub")

    @property
    def base(self) -> Preset:
        """The default recipe of distillation."""
        return DISTILLATION


@dataclass(frozen=True)
class ReproductionConfig:
    """How `ddpm-hf reproduce` measures what it has trained. Every field is a flag beside those of the training."""

    num_samples: int = _flag(50_000, "for FID and Inception score", POSITIVE, group="comparison with the paper")
    num_inference_steps: int | None = _flag(None, "steps of their sampler; the paper, if left out: T", POSITIVE)
    num_images: int | None = _flag(None, "held-out images for bits/dim, the first ones; all if left out", POSITIVE)
    features: str = _flag("inception", "what FID compares: inception, pixels, or a vision model")
    inception_weights: str | None = _flag(None, _INCEPTION)
    batch_size: int | None = _flag(None, "images at a time; as --eval_batch_size if left out", POSITIVE)

    def __post_init__(self) -> None:
        check_limits(self)

    def metrics(self) -> list[str]:
        """Return the paper's metrics; the Inception score needs Inception."""
        metrics = ["nll", "rate_distortion", "fid"]
        return metrics + ["is"] * ("inception" in re.split(r"\s*,\s*", self.features))
