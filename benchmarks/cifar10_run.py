"""CIFAR-10 in minutes: `python benchmarks/cifar10_run.py --data train.npz --minutes 8`

Trains `--preset cifar10_fast` for so many minutes (model and sample grid inside them), then measures: 10,000 samples
by DDIM in 50 steps beside the training and test images, 1,000 by the paper's ancestral sampler, bits/dim of the test
images. All numbers come into `run.json` as soon as they are there, with how they were made; in the same folder are the
model, `samples.png`, the learning curve, and `parts/`, the EMA weights in bf16 as files of at most 16 MiB with the
script that puts them together again. What fails or has no time left loses nothing before it, and a stopped command
continues with `--resume_from_checkpoint latest` added.

`train.npz` and `test.npz` (beside it, or `--test`) hold `images`, `[N, H, W, 3]` uint8. On GPUs training has the
defaults of `ddpm-hf train` there (bf16, compiled, CUDA graphs) and sampling is in bf16 with CUDA graphs; distances are
computed on the device, bits/dim in float32. Other flags are those of `ddpm-hf train`: `--seed 1 --learning_rate 3e-4`.
For a rehearsal on a CPU: `--channels 32 64 --minutes 60`.
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from weight_parts import pack

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, UNet2DModel, get_preset
from ddpm_hf.cli.command_line import Parser
from ddpm_hf.cli.train import parse_training_config
from ddpm_hf.data import load_images
from ddpm_hf.data.tensors import ImageDataset
from ddpm_hf.evaluation import evaluate
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.run import check_evaluation, parse_metrics
from ddpm_hf.evaluation.samples import SAMPLE_METRICS
from ddpm_hf.pipelines.inference import optimize_for_inference
from ddpm_hf.training.checkpointing import check_output_is_ours
from ddpm_hf.training.configuration import POSITIVE, TrainingConfig
from ddpm_hf.utils.errors import UserError, showing_flags
from ddpm_hf.utils.files import write_text
from ddpm_hf.utils.text import finite

_PATHS = ("train_data_dir", "output_dir", "cache_dir", "init_from")
_GROUPS = 32  # of the network's normalization, which its channels are divided into
_CHANNELS = (lambda value: value > 0 and value % _GROUPS == 0, f"must be multiples of {_GROUPS}")
# What `ddpm-hf evaluate` calls them, and this command, for each sampler.
_NAMES = {
    "ddim": {"--num_samples": "--samples", "--num_inference_steps": "--steps"},
    "ddpm": {"--num_samples": "--ancestral", "--num_inference_steps": "--ancestral_steps"},
}
# What `ddpm-hf train` calls them.
_OWN_FLAGS = {"--output_dir": "--output", "--max_train_minutes": "--minutes"}


class Report:
    """What is known so far, on disk; `resumed` keeps what the file holds already."""

    def __init__(self, file: Path, total_minutes: float | None, resumed: bool = False):
        self.file, self.values = file, dict[str, Any]()
        if resumed and file.exists():
            self.values = json.loads(file.read_text())
        self.started = time.monotonic()
        self.end = None if total_minutes is None else self.started + 60 * total_minutes

    def add(self, name: str, value: Any) -> None:
        """Write down a value."""
        self.values[name] = value
        write_text(self.file, json.dumps(finite(self.values), indent=2) + "\n")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[bool]:
        """One part, which is left out where no time is left, and whose failure loses no other."""
        start = time.monotonic()
        if self.end is not None and start > self.end:
            self.add(name, "left out: no time was left")
            yield False
            return
        try:
            yield True
        except Exception as error:
            self.add(name, f"failed: {type(error).__name__}: {error}")
            print(f"{name} failed: {error}", flush=True)
        self.add("seconds", {**self.values.get("seconds", {}), name: round(time.monotonic() - start, 1)})


def _renamed(sentence: str, names: Mapping[str, str]) -> str:
    """Return a sentence with flags as this command calls them."""
    return re.sub("|".join(names), lambda found: names[found[0]], sentence)


def network(channels: Sequence[int] | None, layers: int, shape: Sequence[int]) -> dict[str, Any]:
    """Return the preset's network, or one of other widths; attention is at half of the resolution, as there."""
    found = {**get_preset("cifar10_fast").unet, "sample_size": shape[-1], "layers_per_block": layers}
    if channels:
        blocks = ["AttnDownBlock2D" if level == 1 else "DownBlock2D" for level in range(len(channels))]
        up = [block.replace("Down", "Up") for block in reversed(blocks)]
        found |= {"block_out_channels": tuple(channels), "down_block_types": blocks, "up_block_types": up}
    return found


def load(arguments: argparse.Namespace, rest: Sequence[str]) -> dict[str, ImageDataset]:
    """Load the training and test images, which are square and of one shape, or raise UserError."""
    config = parse_training_config(["--train_data_dir", arguments.data, *rest])
    options = {name: value for name, value in config.image_options().items() if name not in ("crop", "streaming")}
    train, test = Path(arguments.data), Path(arguments.test or Path(arguments.data).with_name("test.npz"))
    files = {"train": ("--data", train)}
    if arguments.test or test.exists():
        files["test"] = ("--test", test)
    sets = {}
    for split, (flag, file) in files.items():
        if not file.is_file():
            raise UserError(f"{flag} {str(file)!r} is no file; give a .npz that holds `images`, [N, H, W, 3] uint8")
        images = load_images(train_data_dir=str(file), **options, channels=3, resolution=None)
        if not isinstance(images, ImageDataset) or not len(images):
            raise UserError(f"{flag} {str(file)!r} holds no images; give some")
        sets[split] = images
    (_, height, width), *others = (tuple(images.images.shape[1:]) for images in sets.values())
    if height != width:
        raise UserError(f"--data {arguments.data!r} holds images of {height}x{width}; this command takes square ones")
    for other in others:
        if other[1:] != (height, width):
            what = f"the test images {str(test)!r} are {other[1]}x{other[2]}, and those of --data {height}x{width}"
            raise UserError(f"{what}; give another file with --test, or make them of one size")
    return sets


def configure(arguments: argparse.Namespace, rest: Sequence[str], shape: Sequence[int]) -> TrainingConfig:
    """Return the training's configuration, or raise UserError: one of its flags, or the output folder, is wrong."""
    flags = ["--preset", "cifar10_fast", "--train_data_dir", arguments.data]
    flags += ["--output_dir", arguments.output]
    flags += ["--max_train_minutes", str(arguments.minutes), "--resolution", str(shape[-1])]
    # One checkpoint, at the end; a curve of bits/dim of images that are held out; grids by DDIM.
    flags += ["--checkpointing_steps", "1000000", "--sampler", "ddim", "--ddpm_num_inference_steps", "50"]
    flags += ["--validation_split", "0.01", "--validation_steps", "2000"]
    flags += ["--eval_num_images", "500", "--eval_num_evaluations", "20"]
    if arguments.channels or arguments.layers != 2:
        flags += ["--init_from", str(Path(arguments.output) / "start")]
    config = parse_training_config([*flags, *rest])
    check_output_is_ours(config)
    return config


def train(arguments: argparse.Namespace, config: TrainingConfig, shape: Sequence[int]) -> dict[str, Any] | None:
    """Train, and return what is worth knowing of it; `None` where it was stopped."""
    start = Path(arguments.output) / "start"
    there = config.resume_from_checkpoint and (start / "model_index.json").exists()  # not if it was stopped before
    if config.init_from == str(start) and not there:
        torch.manual_seed(0)
        unet = UNet2DModel(**network(arguments.channels, arguments.layers, shape))
        DDPMPipeline(unet, DDPMScheduler.from_preset("cifar10_fast")).save_pretrained(start)
    trainer = Trainer(config)
    if trainer.train() is None:
        return None
    return {
        "updates": trainer.step,
        "images": trainer.step * trainer.plan.total,
        "seconds": round(trainer.seconds(), 1),
        "device": str(trainer.device) if trainer.device.type != "cuda" else torch.cuda.get_device_name(),
        "computation": trainer.run.describe_computation(),
        "flags": {name: value for name, value in config.public_values().items() if name not in _PATHS},
    }


class Measurements:
    """What is measured of the model after the training; raises UserError before it: something does not fit."""

    def __init__(self, arguments: argparse.Namespace, sets: dict[str, ImageDataset]):
        self.sets, shape = sets, sets["train"].images.shape[1:]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.metrics = parse_metrics(arguments.metrics)
        if others := [name for name in self.metrics if name not in SAMPLE_METRICS]:
            raise UserError(f"--metrics are those of samples; leave out {others[0]}: bits/dim is always measured")
        self.options = EvaluationOptions(
            batch_size=arguments.batch_size,
            features=arguments.features,
            inception_weights=arguments.inception_weights,
            output=Path(arguments.output) / "evaluation",
            progress=True,
        )
        steps = {"ddim": arguments.steps, "ddpm": arguments.ancestral_steps}
        counts = {"ddim": arguments.samples, "ddpm": arguments.ancestral}
        self.chains = {
            sampler: {"sampler": sampler, "num_inference_steps": steps[sampler], "num_samples": counts[sampler]}
            for sampler in steps
        }
        self.likelihood = {"num_images": arguments.images, "num_evaluations": 50}
        unet = UNet2DModel(**network(arguments.channels, arguments.layers, shape))
        pipe = DDPMPipeline(unet, DDPMScheduler.from_preset("cifar10_fast")).to(self.device)
        for sampler, chain in self.chains.items():
            try:
                check_evaluation(pipe, self.sets, self.metrics, replace(self.options, **chain))
            except UserError as error:
                raise UserError(_renamed(error.args[0], _NAMES[sampler])) from error

    def make(self, folder: Path, report: Report) -> None:
        """Measure the model in a folder."""
        pipe = DDPMPipeline.from_pretrained(folder).to(self.device)
        fast = "bf16" if self.device.type == "cuda" else "fp32"
        held_out = {"test": self.sets["test"]} if "test" in self.sets else self.sets
        plan = [
            ("ddim", fast, self.sets, self.metrics, self.chains["ddim"]),
            ("bits_per_dim", "fp32", held_out, ["nll"], self.likelihood),
            ("ancestral", fast, self.sets, self.metrics, self.chains["ddpm"]),
        ]
        for name, precision, sets, metrics, changes in plan:
            with report.part(name) as due:
                if due:
                    prepare = partial(optimize_for_inference, precision=precision)
                    found = evaluate(pipe, sets, metrics, self.options, prepare=prepare, **changes)
                    report.add(name, {"network computed in": precision, **vars(found)})


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's flags, and those of the training, or raise UserError: one is wrong."""
    parser = Parser("cifar10_run.py", "CIFAR-10 in minutes: train, sample, measure.", "--data train.npz [flags]")
    add = parser.group("flags beside those of ddpm-hf train")
    add("--data", str, None, "train.npz", required=True)
    add("--test", str, None, "test.npz; the file of this name beside --data, if there is one, if left out")
    add("--minutes", float, 8.0, "of the training, with its model and sample grid", POSITIVE)
    add("--total_minutes", float, None, "what has not begun by then is left out", POSITIVE)
    add("--output", str, "runs/cifar10-run", "folder")
    add("--channels", int, None, "of a smaller network, such as 32 64, for a CPU", _CHANNELS, nargs="+")
    add("--layers", int, 2, "residual blocks per resolution", POSITIVE)
    add("--samples", int, 10_000, "by DDIM", POSITIVE)
    add("--steps", int, 50, "of DDIM", POSITIVE)
    add("--ancestral", int, 1000, "samples by the paper's sampler", POSITIVE)
    add("--ancestral_steps", int, 1000, "its steps; the paper: 1000", POSITIVE)
    add("--images", int, 2000, "test images for bits/dim, the first ones", POSITIVE)
    add("--features", str, "pixels", "see ddpm-hf evaluate; several as inception,efficientnet-lite0")
    add("--inception_weights", str, None, "of --features inception")
    add("--metrics", str, "fid,kid,prc,dc,mmd,sw,auth", "of the samples")
    add("--batch_size", int, 500, "images at a time in evaluations", POSITIVE)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.total_minutes is not None and arguments.total_minutes <= arguments.minutes:
        what = f"--total_minutes {arguments.total_minutes:g} leaves no time to measure after --minutes"
        raise UserError(f"{what} {arguments.minutes:g}; give more, or leave it out")
    return arguments, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 1 if a part failed, 2 if nothing could begin, 130 where it was stopped."""
    with showing_flags():
        try:
            code = run(*parse(argv))
        except UserError as error:
            print(f"error: {_renamed(str(error), _OWN_FLAGS)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            code = 130
    if code == 130:
        print("stopped: the same command with --resume_from_checkpoint latest continues", file=sys.stderr)
    return code


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train, measure and pack."""
    sets, output = load(arguments, rest), Path(arguments.output)
    shape = sets["train"].images.shape[1:]
    config = configure(arguments, rest, shape)
    measurements = Measurements(arguments, sets)
    report = Report(output / "run.json", arguments.total_minutes, config.resume_from_checkpoint is not None)
    if (training := train(arguments, config, shape)) is None:
        return 130
    report.add("training", training)
    with report.part("curve") as due:
        if due:
            report.add("curve", json.loads((output / "curve.json").read_text()))
    with report.part("weights") as due:
        if due:
            size = pack(output, output / "parts")
            report.add("weights", {"bytes of all parts": size, "dtype": "bfloat16, rounded from float32"})
    measurements.make(output, report)
    for name in ("ddim", "bits_per_dim", "ancestral"):
        found = report.values[name]
        lines = found if isinstance(found, str) else {n: round(v["value"], 5) for n, v in found["values"].items()}
        print(f"{name}: {lines}")
    return int(any(isinstance(value, str) and value.startswith("failed") for value in report.values.values()))


if __name__ == "__main__":
    raise SystemExit(main())
