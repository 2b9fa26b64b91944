"""One training run, resolved once from its configuration: machine, recipe, images, network arguments, batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..data.datasets import Images, StreamedImages, load_images
from ..models.unet_2d import UNet2DModel, check_size
from ..presets import Preset
from ..utils.errors import UserError, in_one_line
from ..utils.machine import choose_precision, compiler_problem, keep_freed_memory, use_tf32
from ..utils.processes import cpu_only, end_with_the_launcher, log, reduce_in_float32, set_cpu_threads
from ..utils.text import listed
from .configuration import TrainingConfig
from .distillation import Distillation
from .initialization import InitialModel
from .memory import check_memory
from .tracking import known_trackers


@dataclass(frozen=True)
class BatchPlan:
    """How the images of an update are cut."""

    micro: int  # images per micro-batch and process
    accumulation: int  # micro-batches per update and process
    process_index: int
    num_processes: int

    @property
    def total(self) -> int:
        """Images per update."""
        return self.micro * self.accumulation * self.num_processes

    def rows(self, micro: int) -> slice:
        """Return which images of an update this process takes in micro-batch `micro`."""
        start = (micro * self.num_processes + self.process_index) * self.micro
        return slice(start, start + self.micro)


class Computation(NamedTuple):
    """How the network is computed: a function of settings and device, not of timings, so that runs can be repeated."""

    channels_last: bool
    compile: bool
    cuda_graphs: bool


@dataclass(frozen=True)
class Run:
    """What a training run is made of; nothing here changes while it trains."""

    config: TrainingConfig  # what was asked for
    recipe: Preset  # the preset with the configuration's changes
    accelerator: Accelerator  # device, precision and sibling processes
    computation: Computation
    plan: BatchPlan
    data: Images  # for training
    unet_config: dict[str, Any]  # `UNet2DModel` arguments, with the images' classes
    initial: InitialModel | None  # what `--init_from` names
    distillation: Distillation | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.accelerator.device

    @property
    def precision(self) -> str:
        """What the network computes in: float32, bf16 or fp16."""
        return {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)

    def describe_images(self) -> str:
        """Return how many images of what."""
        if self.distillation is not None:
            return self.data.name
        count = "a stream" if isinstance(self.data, StreamedImages) else f"{len(self.data)} images"
        return f"{count} of {self.data.name}"

    def describe_computation(self) -> str:
        """Return how the network is computed."""
        ways = zip(("channels_last", "compiled", "CUDA graphs"), self.computation, strict=True)
        return ", ".join([f"precision {self.precision}", *(way for way, on in ways if on)])

    def describe_classes(self) -> str | None:
        """Return which classes are trained on, or not used; `None` where there are none."""
        if not (names := self.data.class_names):
            return None
        if self.config.class_conditional:
            return f"{len(names)} classes: {listed(names)}"
        return f"the images' {len(names)} classes are not used (--class_conditional): {listed(names)}"


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Set up device, precision, trackers, processes and PyTorch's switches, or raise UserError: it is not possible."""
    trackers: Any = known_trackers(config.report_to) or None
    precision, logs = choose_precision(config.mixed_precision), Path(config.output_dir) / config.logging_dir
    try:
        accelerator = Accelerator(cpu=cpu_only(), mixed_precision=precision, log_with=trackers, project_dir=str(logs))
    except (ValueError, ImportError) as error:  # also a second precision in one process, which it has one of
        raise UserError(f"accelerate cannot be set up as configured: {in_one_line(error)}") from error
    _check_engine(accelerator, config.channels_last)
    reduce_in_float32(accelerator)
    if accelerator.device.type == "cpu":
        set_cpu_threads(config.num_cpu_threads, accelerator.num_processes)
        keep_freed_memory()
    use_tf32(config.tf32)
    end_with_the_launcher()
    return accelerator


def _check_engine(accelerator: Accelerator, channels_last: bool | None) -> None:
    engine, precision = accelerator.distributed_type, accelerator.mixed_precision
    fsdp = engine == DistributedType.FSDP
    ways = "FSDP 2 (examples/accelerate/fsdp2.yaml) or several processes (examples/accelerate/multi_gpu.yaml)"
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"{engine.value} saves its state with pickle, which checkpoints here do not hold; use {ways}")
    if fsdp and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError(f"FSDP 1 keeps one flat tensor per block, which checkpoints here do not hold; use {ways}")
    if fsdp and channels_last:
        raise UserError("FSDP 2 does not shard weights in channels_last; leave --channels_last out")
    if precision == "fp16" and accelerator.scaler is None:
        raise UserError("--mixed_precision fp16 needs a GPU, and there is none here; use bf16, or no for float32")
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"mixed precision {precision!r} is not supported; use bf16, fp16 or no")


def choose_computation(config: TrainingConfig, accelerator: Accelerator) -> Computation:
    """Return how to compute the network: as configured (UserError if that is not possible), else what is fast here."""
    # FSDP 2 shards no weights in channels_last, and was not tried with compiled networks.
    fast = accelerator.device.type == "cuda" and accelerator.distributed_type != DistributedType.FSDP
    channels_last = fast if config.channels_last is None else config.channels_last
    compiled = fast if config.compile is None else config.compile
    if compiled and (problem := compiler_problem(accelerator.device)):
        if config.compile:
            raise UserError(f"--compile true is not possible here: {problem}; leave it out")
        log(f"the network is not compiled, which is slower: {problem}")
        compiled = False
    # Gradient checkpointing saves the generators' states, which CUDA does not allow during a capture.
    alone = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
    captured = fast and alone and not config.gradient_checkpointing and config.cuda_graphs
    return Computation(channels_last, compiled, captured)


def resolve(config: TrainingConfig, accelerator: Accelerator, initial: InitialModel | Distillation | None) -> Run:
    """Open the images and decide everything that follows from configuration and machine, or raise UserError."""
    recipe = config.resolved_preset(None if initial is None else initial.preset)
    micro, accumulation, _ = config.batch_plan(accelerator.num_processes)
    plan = BatchPlan(micro, accumulation, accelerator.process_index, accelerator.num_processes)
    computation = choose_computation(config, accelerator)
    with torch.device("meta"):  # what cannot be, before any image is read
        unet = UNet2DModel(**recipe.unet)
    check_size(unet, *image_size(recipe.unet), otherwise=" as --resolution")
    check_memory(unet, config, accelerator, micro, eager=not computation.compile)
    if isinstance(initial, Distillation):
        images = initial.images(initial.new_points("meta"))
        return Run(config, recipe, accelerator, computation, plan, images, dict(recipe.unet), None, initial)
    data = load_split(config, recipe.unet, "train")
    if not isinstance(data, StreamedImages) and not len(data):
        raise UserError(f"{data.name!r} has no images to train on")
    unet_config = dict(recipe.unet)
    if config.class_conditional:
        if (names := data.class_names) is None:
            how = "use a folder of folders, or a dataset with a label column (--label_column)"
            raise UserError(f"--class_conditional needs classes, and {data.name!r} has none: {how}")
        null = {"_null_class": len(names)} if config.class_dropout else {}  # one more class stands for none
        unet_config |= {"num_class_embeds": len(names) + len(null), "_class_names": list(names), **null}
    return Run(config, recipe, accelerator, computation, plan, data, unet_config, initial)


def image_size(network: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the images of a network with these arguments."""
    size = network["sample_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def image_arguments(config: TrainingConfig, network: Mapping[str, Any], center: bool) -> dict[str, Any]:
    """Return `data.load_images`'s arguments but for the split; `center` crops no image at random."""
    options = config.image_options()
    if center and "crop" in options:
        options["crop"] = "center"
    options |= {"channels": network.get("in_channels", 3), "resolution": image_size(network)}
    return {**config.images_given(), **options, "validation_split": config.validation_split}


def load_split(config: TrainingConfig, network: Mapping[str, Any], split: str) -> Images:
    """Load a run's images: `train`, or the `validation` images, which are never cropped at random."""
    return load_images(split=split, **image_arguments(config, network, center=split != "train"))
