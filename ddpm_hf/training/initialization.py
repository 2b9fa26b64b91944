"""The model that a run starts from (`--init_from`): what its network, classes and variance become in the run.

Network and noise schedule are the given model's, the rest of the recipe is the preset's. Every weight that fits is
copied; what is new starts so that the network computes what it computed before.
"""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.class_labels import Classes
from ..diffusion.scheduling_ddpm import LEARNED_VARIANCES, OPTIMAL_VARIANCE, DDPMScheduler
from ..models.unet_2d import UNet2DModel
from ..pipelines.pipeline_ddpm import load_named, name_on_hub
from ..presets import Preset, get_preset
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.processes import log
from ..utils.text import listed
from .configuration import TrainingConfig

_CLASSES = "class_embedding.weight"  # [classes, D]
_PROCESS = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"]
_PROCESS += ["rescale_betas_zero_snr", "prediction_type", "variance_type"]


@dataclass(frozen=True)
class InitialModel:
    """A model as the start of a run; in a resumed run what its checkpoint records of it, without weights."""

    name: str  # as in `--init_from`
    base_model: str | None  # the name on the Hub, if it has one
    digest: str  # SHA-256 of the weights
    preset: Preset  # the recipe, with the model's network and noise schedule
    config: dict[str, Any]  # of the model's network
    weights: dict[str, Tensor] | None  # on the CPU

    @property
    def record(self) -> dict[str, Any]:
        """What checkpoints keep of it."""
        return {"model": self.name, "base_model": self.base_model, "digest": self.digest}


def open_initial_model(config: TrainingConfig, state: dict[str, Any] | None) -> InitialModel | None:
    """Return the model that a run starts from, or started from; `None` for a run from the paper's initialisation.

    `state` is what the checkpoint records from which the run resumes; the model itself is not needed then. Raises
    UserError: it cannot be loaded, the flags contradict it, or the checkpoint's run started from another one.
    """
    if state is not None:
        return _recorded_model(config, state)
    if (name := config.init_from) is None:
        return None
    pipe = load_named("--init_from", name, as_ddpm=True, dtype=torch.float32)
    if own := pipe.distilled_steps:
        what = f"--init_from {name} is distilled, and knows its own {own} timesteps only"
        raise UserError(f"{what}; start from the model that it was made from")
    scheduler = pipe.scheduler
    known = inspect.signature(DDPMScheduler.__init__).parameters  # without what other samplers keep for themselves
    process = {key: value for key, value in scheduler.config.items() if key in known}
    process["variance_type"] = scheduler.variance_type
    if scheduler.variance_type == OPTIMAL_VARIANCE:
        log(f"the optimal variance of {name} was measured for its weights; training goes by fixed_small")
        process["variance_type"] = "fixed_small"
    network = dict(pipe.unet.config)
    _check_fit(config, network, process)
    planned = get_preset(config.preset)
    here = {**planned.scheduler, "in_channels": planned.unet.get("in_channels", 3)}
    there = {**{key: process[key] or None for key in _PROCESS}, "in_channels": network["in_channels"]}
    if other := [f"{key} {value}"[:40] for key, value in there.items() if value != here.get(key)]:
        log(f"taken from {name}, not from the preset: {', '.join(other)}")
    base_model, digest = name_on_hub(name), weights_digest(pipe.unet)
    preset = _with_network(config, network, process)
    return InitialModel(name, base_model, digest, preset, network, pipe.unet.state_dict())


def _recorded_model(config: TrainingConfig, state: dict[str, Any]) -> InitialModel | None:
    """Return what a checkpoint's `state` records of the model that its run started from."""
    record = state.get("init_from")
    if config.init_from not in (None, record and record["model"]):
        started = f"--init_from {record['model']}" if record else "no --init_from"
        what = f"the run in {config.output_dir!r} started with {started}, not with {config.init_from}"
        raise UserError(f"{what}; leave out --init_from to resume it, or name another --output_dir for a new run")
    if record is None:
        return None
    if config.init_from is not None:
        log(f"the run resumes from its own weights; --init_from {config.init_from} was for its start")
    preset = _with_network(config, state["network"], state["scheduler"])
    return InitialModel(record["model"], record["base_model"], record["digest"], preset, state["network"], None)


def _with_network(config: TrainingConfig, network: dict[str, Any], process: dict[str, Any]) -> Preset:
    """Return the preset with another network, but for classes, which are the images', and with another process."""
    preset = get_preset(config.preset)
    kept = {k: v for k, v in network.items() if not k.startswith("_") and k != "num_class_embeds"}
    return dataclasses.replace(preset, unet={**kept, "dropout": preset.unet["dropout"]}, scheduler=process)


def _check_fit(config: TrainingConfig, network: dict[str, Any], process: dict[str, Any]) -> None:
    """Raise UserError where a network cannot be trained as it is, or flags say that it computes something else."""
    name, predicts, was = config.init_from, process["prediction_type"], process["variance_type"]
    if (kind := network["class_embed_type"]) is not None:
        raise UserError(f"--init_from {name}: class_embed_type {kind!r} takes other labels than the classes of images")
    outputs = network["in_channels"] * (2 if was in LEARNED_VARIANCES else 1)
    if network["out_channels"] != outputs:
        belong = f"{network['in_channels']} image channels with variance_type {was!r}"
        what = f"--init_from {name}: conv_out has {network['out_channels']} channels"
        raise UserError(f"{what}, and {outputs} belong to {belong}")
    if network["sample_size"] is None and config.resolution is None:
        raise UserError(f"--init_from {name} has no sample_size; add --resolution with the size of the images")
    if config.prediction_type not in (None, predicts):
        raise UserError(f"--init_from {name} predicts {predicts}, not {config.prediction_type}; leave the flag out")
    if (classes := Classes.of(network)).count and not config.class_conditional:
        raise UserError(f"--init_from {name} is class-conditional ({classes.known()}); add --class_conditional")
    wanted = config.variance_type or was
    if wanted == was or wanted not in LEARNED_VARIANCES:
        return
    if was in LEARNED_VARIANCES:
        raise UserError(f"--init_from {name} has the variance {was}, not {wanted}; leave the flag out")
    if wanted == "learned":
        raise UserError(f"--variance_type learned cannot start as the {was} of --init_from {name}; use learned_range")


def initialize(unet: UNet2DModel, initial: InitialModel) -> None:
    """Copy a model's weights into a run's new network; log what is not a plain copy; UserError: weights do not fit."""
    assert initial.weights is not None  # else the run resumes, from weights of its own
    old, new = dict(initial.weights), unet.state_dict()
    log(f"starting from {initial.name} ({initial.digest[:12]}); --preset {initial.preset.name} is the recipe only")
    size, before = (_sides(of["sample_size"]) for of in (unet.config, initial.config))
    if size != before:
        log(f"the images are {size}, and those of {initial.name} were {before}: its weights fit any such size")
    if _CLASSES in new:
        old[_CLASSES] = _class_rows(initial, Classes.of(unet.config), len(new[_CLASSES]), new[_CLASSES].shape[1])
    if (outputs := unet.config.out_channels) != (had := initial.config["out_channels"]):
        variance = initial.preset.scheduler["variance_type"]
        # Nichol & Dhariwal 2021, Eq. 15, with v = (output + 1) / 2: beta_t is v = 1, beta_tilde_t is v = 0
        bias = 1.0 if "large" in variance else -1.0
        for part, value in (("weight", 0.0), ("bias", bias)):
            rows = old[f"conv_out.{part}"][:outputs]
            old[f"conv_out.{part}"] = torch.cat([rows, rows.new_full((outputs - len(rows), *rows.shape[1:]), value)])
        learns = f"the {outputs - had} new ones start as {variance}" if outputs > had else "those of its variance go"
        log(f"the network of {initial.name} had {had} output channels and has {outputs}: {learns}")
    shapes = [{name: tuple(value.shape) for name, value in of.items()} for of in (old, new)]
    both = [(name, *(of.get(name, "none") for of in shapes)) for name in {**shapes[0], **shapes[1]}]
    if wrong := [f"{name} {has} for {needs}" for name, has, needs in both if has != needs]:
        raise UserError(f"--init_from {initial.name} does not fit the network: {'; '.join(wrong)}")
    unet.load_state_dict(old)


def _class_rows(initial: InitialModel, classes: Classes, count: int, width: int) -> Tensor:
    """Return the class embedding `[count, width]` of the run's classes, and log which of them are new.

    Known ones, by name, keep their row; new ones start at the mean of these, which is nearest to all of them together
    (a random row would be a class that the network has never seen), or at 0, which adds nothing to the time embedding.
    """
    before, old = Classes.of(initial.config), (initial.weights or {}).get(_CLASSES)
    if old is None:
        log(f"{initial.name} had no classes: the rows of all {len(classes.names)} start at 0")
        return torch.zeros(count, width)
    # Without names, as in stock's networks, classes are called by their numbers.
    known = {name: row for row, name in enumerate(before.all_names()) if row != before.null}
    mean = old[list(known.values())].mean(0)
    if before.null is not None:
        known["no class"] = before.null
    wanted = [*classes.names, *(["no class"] if classes.null is not None else [])]
    parts = {
        "kept": [name for name in wanted if name in known],
        "new, starting at the mean of those known": [name for name in wanted if name not in known],
        "dropped": [name for name in known if name not in wanted],
    }
    log("; ".join(f"classes {what}: {listed(names)}" for what, names in parts.items() if names))
    return torch.stack([old[known[name]] if name in known else mean for name in wanted])


def _sides(sample_size: Any) -> str:
    return "x".join(map(str, [sample_size] * 2 if isinstance(sample_size, int) else sample_size or ["of any size"]))
