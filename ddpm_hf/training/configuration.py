"""What a training run can be told: flags and YAML keys, their defaults and their limits.

Names are those of diffusers' unconditional training example wherever it has the flag. `None` means "as the preset
says".
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..presets import PRESETS, Preset, get_preset
from ..utils.errors import UserError
from ..utils.files import write_text


def paper_value(read: Callable[[Preset], Any]) -> str:
    """What the paper's experiments (Table 2's ablations aside) have of something, for help texts.

    Args:
        read: Takes it from a preset.
    """
    large = {name for name, preset in PRESETS.items() if preset.unet["sample_size"] == 256}
    found: dict[str, list[str]] = {}
    for name, preset in PRESETS.items():
        if name == "cifar10" or name in large:
            value = read(preset)
            text = (
                str(value).lower() if isinstance(value, bool) else f"{value:g}" if value.__class__ is float else value
            )
            found.setdefault(str(text), []).append(name)
    if len(found) == 1:
        return f"the paper: {next(iter(found))}"
    of = {text: "256x256" if set(names) == large else ", ".join(names) for text, names in found.items()}
    return "the paper: " + "; ".join(f"{text} ({names})" for text, names in of.items())


def _flag(
    default: Any, help: str, group: str, repr: bool = True, paper: str | Callable[[Preset], Any] | None = None
) -> Any:
    """A field that is a flag; `paper` names the attribute of a preset that has the paper's value, or takes it."""
    if isinstance(paper, str):
        paper = operator.attrgetter(paper)
    text = help if paper is None else f"{help}; {paper_value(paper)}"
    return field(default=default, metadata={"help": text, "group": group}, repr=repr)


# The titles that `--help` shows flags under.
_MODEL = "network and diffusion process; what is left out is as in --preset"
_IMAGES = "images"
_RECIPE = "recipe; what is left out is as in --preset"
_OUTPUT = "output and checkpoints"
_SAMPLES = "samples on the way"
_EVALUATION = "evaluation on the way"
_MACHINE = "machine and trackers"
_HUB = "Hub"
_COMPARISON = "comparison with the paper"


def due(step: int, interval: int | None) -> bool:
    """Whether what is done every `interval` updates (never for `None`) is due after update `step`."""
    return interval is not None and step % interval == 0


class TrainingError(UserError):
    """A run cannot go on; the message says why and what is left on disk."""


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. Every field is a flag of `examples/train.py` and a key of its YAML file.

    Raises:
        ValueError: A value is outside its range; the message says which flag, which value and what is possible.
    """

    preset: str = _flag("cifar10", f"the experiment that gives network and recipe: {', '.join(PRESETS)}", _MODEL)
    dropout: float | None = _flag(None, "dropout in the residual blocks", _MODEL, paper=lambda p: p.unet["dropout"])
    prediction_type: str | None = _flag(
        None,
        "what the network predicts: epsilon, sample, v_prediction or posterior_mean",
        _MODEL,
        paper=lambda p: p.scheduler["prediction_type"],
    )
    variance_type: str | None = _flag(
        None,
        "of the reverse process: fixed_small, fixed_large, learned or learned_range (which double the outputs)",
        _MODEL,
        paper=lambda p: p.scheduler["variance_type"],
    )
    class_conditional: bool = _flag(False, "train on the images' classes", _MODEL)
    class_dropout: float = _flag(0.0, "share of images trained without their class (for guidance)", _MODEL)
    dataset: str | None = _flag(None, "a built-in dataset: digits", _IMAGES)
    dataset_name: str | None = _flag(None, "a dataset by Hub id or local path", _IMAGES)
    dataset_config_name: str | None = _flag(None, "the configuration of that dataset", _IMAGES)
    train_data_dir: str | None = _flag(None, "a folder of images; subfolders are classes", _IMAGES)
    cache_dir: str | None = _flag(None, "where downloaded datasets are kept; default: as datasets has it", _IMAGES)
    image_column: str | None = _flag(None, "the dataset's column of images; found by itself if left out", _IMAGES)
    label_column: str | None = _flag(None, "the dataset's column of classes; found by itself if left out", _IMAGES)
    resolution: int | list[int] | None = _flag(
        None,
        "height and width of the images, or one number for both; default: the preset's",
        _IMAGES,
        paper=lambda p: p.unet["sample_size"],
    )
    center_crop: bool = _flag(True, "crop images of another shape in the middle; false: at random", _IMAGES)
    random_flip: bool | None = _flag(
        None, "mirror images at random; default: as the preset says", _IMAGES, paper="random_flip"
    )
    background: str = _flag("white", "colour under transparent pixels", _IMAGES)
    value_range: list[float] | None = _flag(None, "what .npy arrays call black and white, for example 0 1", _IMAGES)
    array_layout: str | None = _flag(None, "HWC or CHW, for .npy arrays whose shape fits both", _IMAGES)
    on_bad_image: str = _flag("error", "error, or skip: name unreadable images and go on without them", _IMAGES)
    streaming: bool = _flag(False, "read the dataset from end to end, without keeping it", _IMAGES)
    dataloader_num_workers: int = _flag(4, "threads that decode images which do not fit into memory", _IMAGES)
    validation_split: float = _flag(0.0, "share of the images never trained on (digits has its own)", _IMAGES)
    max_train_steps: int | None = _flag(None, "optimizer updates", _RECIPE, paper="max_train_steps")
    train_batch_size: int | None = _flag(
        None, "images per process and micro-batch; chosen to reach the total batch size if left out", _RECIPE
    )
    total_batch_size: int | None = _flag(
        None, "images per update, over processes and accumulation", _RECIPE, paper="total_batch_size"
    )
    gradient_accumulation_steps: int | None = _flag(
        None, "micro-batches per update; chosen to reach the total batch size if left out", _RECIPE
    )
    learning_rate: float | None = _flag(None, "peak learning rate of Adam", _RECIPE, paper="learning_rate")
    lr_scheduler: str | None = _flag(
        None, "constant, cosine or linear, after the warm-up", _RECIPE, paper="lr_scheduler"
    )
    lr_warmup_steps: int | None = _flag(None, "updates of linear warm-up", _RECIPE, paper="lr_warmup_steps")
    max_grad_norm: float | None = _flag(
        None, "gradients of a larger norm are scaled down", _RECIPE, paper="max_grad_norm"
    )
    ema_max_decay: float | None = _flag(None, "decay of the averaged weights (EMA)", _RECIPE, paper="ema_decay")
    loss: str | None = _flag(
        None, "simple (Eq. 14), vlb (the bound) or hybrid (learned variance)", _RECIPE, paper="loss"
    )
    timestep_sampling: str | None = _flag(
        None, "uniform, or stratified over each batch", _RECIPE, paper="timestep_sampling"
    )
    seed: int = _flag(0, "seed of everything random", _RECIPE)
    output_dir: str = _flag("ddpm-model", "where the model and the checkpoints go", _OUTPUT)
    checkpointing_steps: int = _flag(5000, "updates between checkpoints", _OUTPUT)
    checkpoints_total_limit: int | None = _flag(None, "how many checkpoints to keep; all if left out", _OUTPUT)
    resume_from_checkpoint: str | None = _flag(
        None, "latest, or a checkpoint's folder; starts anew if left out", _OUTPUT
    )
    save_images_steps: int | None = _flag(
        None, "updates between grids of samples; only at the end if left out", _SAMPLES
    )
    num_sample_images: int = _flag(64, "images in a grid", _SAMPLES)
    ddpm_num_inference_steps: int = _flag(
        1000,
        "steps of the sampler, for grids and --eval_metrics",
        _SAMPLES,
        paper=lambda p: p.scheduler["num_train_timesteps"],
    )
    sampler: str = _flag("ddpm", "ddpm (Algorithm 2; the paper) or ddim, for grids and --eval_metrics", _SAMPLES)
    validation_steps: int | None = _flag(None, "updates between evaluations; only at the end if left out", _EVALUATION)
    eval_metrics: str = _flag("nll", "what to measure, of nll (bits/dim), fid, is, kid, prc: nll,fid", _EVALUATION)
    eval_num_images: int = _flag(1000, "held-out images for bits/dim; 0 leaves it out", _EVALUATION)
    eval_num_evaluations: int = _flag(50, "network evaluations per image for bits/dim (stratified)", _EVALUATION)
    eval_num_samples: int = _flag(5000, "samples for fid, is, kid, prc; the paper, at the end: 50000", _EVALUATION)
    eval_features: str = _flag(
        "inception", "what fid, kid and prc compare: inception, pixels, or as ddpm-hf evaluate", _EVALUATION
    )
    eval_inception_weights: str | None = _flag(
        None, "torch-fidelity's weights file; its own place if left out", _EVALUATION
    )
    eval_batch_size: int | None = _flag(
        None,
        "images at a time, for evaluations and grids; changes no number; 256 (grids: 64) if left out, fewer of images "
        "larger than 32x32, but never fewer than a micro-batch of the training",
        _EVALUATION,
    )
    best_metric: str | None = _flag(
        None,
        "keep the model that is best by this number in best/: bits_per_dim, fid_inception_train_float, ...",
        _EVALUATION,
    )
    mixed_precision: str | None = _flag(
        None, "no, fp16 or bf16 for the network; default: the launcher's, else bf16 on GPUs that have it", _MACHINE
    )
    num_cpu_threads: int | None = _flag(
        None, "CPU threads per process; the cores are shared out evenly if left out", _MACHINE
    )
    tf32: bool = _flag(False, "NVIDIA GPUs: faster float32 products with 10 bits of mantissa", _MACHINE)
    compile: bool | None = _flag(None, "torch.compile the network; default: on NVIDIA GPUs", _MACHINE)
    channels_last: bool | None = _flag(None, "channels_last memory layout; default: on NVIDIA GPUs", _MACHINE)
    cuda_graphs: bool = _flag(True, "NVIDIA GPUs: launch an update as one captured graph", _MACHINE)
    gradient_checkpointing: bool = _flag(False, "trade time for memory", _MACHINE)
    report_to: str | None = _flag(
        None, "trackers by accelerate: tensorboard, wandb, ...; several as a,b; all; none (the default)", _MACHINE
    )
    logging_steps: int = _flag(10, "updates between the numbers that trackers get", _MACHINE)
    logging_dir: str = _flag("logs", "where trackers write, inside the output folder", _MACHINE)
    push_to_hub: bool = _flag(False, "publish the model on the Hub, with every checkpoint and at the end", _HUB)
    hub_model_id: str | None = _flag(None, "org/name on the Hub; the output folder's name if left out", _HUB)
    hub_private_repo: bool = _flag(True, "false: publish for everybody to see", _HUB)
    hub_token: str | None = _flag(None, "better: 'hf auth login' or HF_TOKEN; never saved", _HUB, repr=False)
    license: str | None = _flag(None, "of the model, for its card, such as apache-2.0", _HUB)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # what Python callers write naturally
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif isinstance(value, tuple):
                object.__setattr__(self, name, list(value))
        if not self.output_dir:
            raise UserError("--output_dir is empty; name a folder")
        get_preset(self.preset)
        positive = (
            "max_train_steps train_batch_size total_batch_size gradient_accumulation_steps learning_rate "
            "max_grad_norm checkpointing_steps checkpoints_total_limit save_images_steps validation_steps "
            "num_sample_images ddpm_num_inference_steps eval_num_evaluations eval_num_samples eval_batch_size "
            "num_cpu_threads logging_steps"
        )
        for name in positive.split():
            value = getattr(self, name)
            # an infinite norm is a way to say that gradients are not scaled down
            if value is not None and not (0 < value < math.inf or (name == "max_grad_norm" and value == math.inf)):
                raise UserError(f"--{name} must be positive, got {value}")
        for name in ("lr_warmup_steps", "eval_num_images", "dataloader_num_workers"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--{name} must not be negative, got {value}")
        sizes = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        sizes = [1 if size is None else size for size in sizes]
        if len(sizes) not in (1, 2) or min(sizes) <= 0:
            raise UserError(f"--resolution takes one or two positive numbers, got {self.resolution}")
        if (self.num_cpu_threads or 0) > 4096:
            raise UserError(f"--num_cpu_threads is at most 4096, got {self.num_cpu_threads}")
        if self.value_range is not None and (
            len(self.value_range) != 2 or not -math.inf < self.value_range[0] < self.value_range[1] < math.inf
        ):
            raise UserError(f"--value_range takes two rising numbers, for example 0 1, got {self.value_range}")
        if self.hub_model_id is not None and not self.push_to_hub:
            raise UserError(f"--hub_model_id {self.hub_model_id} needs --push_to_hub")
        if self.best_metric is not None and self.validation_steps is None:
            raise UserError(f"--best_metric {self.best_metric} needs --validation_steps: how often to measure")
        if self.class_dropout and not self.class_conditional:
            raise UserError(f"--class_dropout {self.class_dropout} needs --class_conditional")
        for name in ("validation_split", "ema_max_decay", "dropout", "class_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"--{name} must be at least 0 and less than 1, got {value}")
        choices = {
            "lr_scheduler": ("constant", "cosine", "linear"),
            "loss": ("simple", "vlb", "hybrid"),
            "timestep_sampling": ("uniform", "stratified"),
            "mixed_precision": ("no", "fp16", "bf16"),
            "sampler": ("ddpm", "ddim"),
            "on_bad_image": ("error", "skip"),
            "array_layout": ("HWC", "CHW"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
        if self.eval_num_evaluations % 2:
            raise UserError(f"--eval_num_evaluations must be even, got {self.eval_num_evaluations}")

    def resolved_preset(self) -> Preset:
        """The preset with this run's changes to it."""
        preset = get_preset(self.preset)
        same_name = (
            "max_train_steps total_batch_size learning_rate lr_scheduler lr_warmup_steps max_grad_norm loss "
            "random_flip timestep_sampling"
        )
        changes = {name: getattr(self, name) for name in same_name.split() if getattr(self, name) is not None}
        if self.ema_max_decay is not None:
            changes["ema_decay"] = self.ema_max_decay
        unet = dict(preset.unet)
        if self.resolution is not None:
            sizes = self.resolution if isinstance(self.resolution, list) else [self.resolution]
            unet["sample_size"] = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        if self.dropout is not None:
            unet["dropout"] = self.dropout
        scheduler = dict(preset.scheduler)
        for name in ("prediction_type", "variance_type"):
            if getattr(self, name) is not None:
                scheduler[name] = getattr(self, name)
        learned = ("learned", "learned_range")
        if scheduler["variance_type"] in learned:
            unet["out_channels"] = 2 * unet.get("in_channels", 3)
        elif preset.scheduler["variance_type"] in learned:  # and this run's is not
            unet["out_channels"] = unet.get("in_channels", 3)
        recipe = dataclasses.replace(preset, **changes, unet=unet, scheduler=scheduler)
        if scheduler["variance_type"] in learned and recipe.loss == "simple":
            raise UserError(
                f"--loss simple does not train the variance of --variance_type {scheduler['variance_type']}; add "
                "--loss hybrid or vlb, or take a fixed variance"
            )
        if recipe.loss == "hybrid" and unet.get("out_channels", 3) == unet.get("in_channels", 3):
            raise UserError("--loss hybrid trains a learned variance; add --variance_type learned_range")
        return recipe

    def images_given(self) -> dict[str, Any]:
        """Which of the three ways to name images was used; the preset's own dataset if none was."""
        given = {
            name: getattr(self, name)
            for name in ("dataset", "dataset_name", "train_data_dir")
            if getattr(self, name) is not None
        }
        default = get_preset(self.preset).dataset
        if given or default is None:
            return given
        return {"dataset": default} if default == "digits" else {"dataset_name": default}

    def image_options(self) -> dict[str, Any]:
        """What `data.load_images` wants to know besides where the images are."""
        given = self.images_given()
        if "dataset" in given:
            return {"background": self.background}
        options: dict[str, Any] = {
            "background": self.background,
            "crop": "center" if self.center_crop else "random",
            "on_bad_image": self.on_bad_image,
            "num_workers": self.dataloader_num_workers,
            "streaming": self.streaming,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "config_name": self.dataset_config_name,
            "cache_dir": self.cache_dir,
        }
        if self.array_layout is not None:
            options["array_layout"] = self.array_layout
        if self.value_range is not None:
            options["value_range"] = tuple(self.value_range)
        return options

    def batch_plan(self, num_processes: int) -> tuple[int, int, int]:
        """(images per micro-batch and process, micro-batches per update, images per update).

        Raises:
            ValueError: The total batch size cannot be reached exactly.
        """
        total = self.total_batch_size or get_preset(self.preset).total_batch_size
        per_process, accumulation = self.train_batch_size, self.gradient_accumulation_steps
        if per_process is not None and accumulation is not None:
            product = per_process * accumulation * num_processes
            if self.total_batch_size not in (None, product):
                raise UserError(
                    f"--train_batch_size {per_process} x --gradient_accumulation_steps {accumulation} x "
                    f"{num_processes} process(es) is {product}, not "
                    f"--total_batch_size {self.total_batch_size}; leave one of them out"
                )
            return per_process, accumulation, product
        known = num_processes * (per_process or accumulation or 1)
        if total % known:
            raise UserError(
                f"the total batch size {total} is not a multiple of {known} ("
                + (f"--train_batch_size {per_process} x " if per_process else "")
                + (f"--gradient_accumulation_steps {accumulation} x " if accumulation else "")
                + f"{num_processes} process(es)); change one of them, or --total_batch_size"
            )
        if per_process is not None:
            return per_process, total // known, total
        return total // known, accumulation or 1, total

    def evaluation_batch(self, num_processes: int, most: int = 256) -> int:
        """Images at a time and process where nothing is trained.

        Without gradients an image takes a small part of the memory that it takes in training, so a batch as large as a
        micro-batch cannot be the first for which it is too little.

        Args:
            num_processes: All of them.
            most: The largest batch, unless `eval_batch_size` says another.
        """
        if self.eval_batch_size is not None:
            return self.eval_batch_size
        size = self.resolved_preset().unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return min(most, max(self.batch_plan(num_processes)[0], 256 * 32 * 32 // (height * width), 1))

    def inference_steps(self, num_train_timesteps: int) -> int:
        """Steps of the sampler: a chain has no more than its T."""
        return min(self.ddpm_num_inference_steps, num_train_timesteps)

    def public_values(self) -> dict[str, Any]:
        """All of it but the access token, for files and trackers."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}

    def save(self, path: Path) -> None:
        """Write the run's configuration as YAML that `--config` reads, completely or not at all."""
        import yaml

        write_text(path, yaml.safe_dump(self.public_values(), sort_keys=False))


@dataclass(frozen=True)
class ReproductionConfig:
    """How `ddpm-hf reproduce` measures what it has trained. Every field is a flag beside those of the training.

    Raises:
        ValueError: A value is outside its range.
    """

    num_samples: int = _flag(50_000, "samples for FID and the Inception score, as in the paper", _COMPARISON)
    num_inference_steps: int | None = _flag(
        None, "steps of their sampler; all T if left out, as in the paper", _COMPARISON
    )
    num_images: int | None = _flag(
        None, "the first this many held-out images, for bits/dim; all if left out", _COMPARISON
    )
    features: str = _flag("inception", "what FID compares: inception, pixels, or as ddpm-hf evaluate", _COMPARISON)
    inception_weights: str | None = _flag(
        None, "torch-fidelity's weights file; its own place if left out", _COMPARISON
    )
    batch_size: int | None = _flag(
        None, "images at a time; changes no number; as --eval_batch_size if left out", _COMPARISON
    )

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_inference_steps", "num_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < math.inf:
                raise UserError(f"--{name} must be positive, got {value}")

    def feature_names(self) -> list[str]:
        """What to compare images by."""
        return [part.strip() for part in self.features.split(",")]

    def metrics(self) -> list[str]:
        """The paper's: the Inception score needs Inception."""
        return ["nll", "rate_distortion", "fid", *(["is"] if "inception" in self.feature_names() else [])]
