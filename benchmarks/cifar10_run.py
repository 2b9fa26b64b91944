"""CIFAR-10 in minutes: `python benchmarks/cifar10_run.py --data train.npz --minutes 8`

Trains `--preset cifar10_fast` for so many minutes (model and sample grid inside them), then measures: 10,000 samples
by DDIM in 50 steps beside the training and test images, 1,000 by the paper's ancestral sampler, bits/dim of the test
images. All numbers come into `run.json` as soon as they are there, with how they were made; in the same folder are the
model, `samples.png`, the learning curve, and `parts/`, the EMA weights in bf16 as files of at most 16 MiB with the
script that puts them together again. What fails or has no time left loses nothing before it.

`train.npz` and `test.npz` (beside it, or `--test`) hold `images`, `[N, H, W, 3]` uint8. On GPUs training has the
defaults of `ddpm-hf train` there (bf16, compiled, CUDA graphs) and sampling is in bf16 with CUDA graphs; distances are
computed on the device, bits/dim in float32. Other flags are those of `ddpm-hf train`: `--seed 1 --learning_rate 3e-4`.
For a rehearsal on a CPU: `--channels 32 64 --minutes 60`.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from weight_parts import pack

from ddpm_hf import DDPMPipeline, DDPMScheduler, Trainer, UNet2DModel, get_preset
from ddpm_hf.cli.train import parse_training_config
from ddpm_hf.data import load_images
from ddpm_hf.evaluation import evaluate
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.run import check_evaluation
from ddpm_hf.pipelines.inference import optimize_for_inference
from ddpm_hf.utils.errors import UserError, showing_flags
from ddpm_hf.utils.files import write_text
from ddpm_hf.utils.text import finite

_PATHS = ("train_data_dir", "output_dir", "cache_dir", "init_from")


class Report:
    """What is known so far, on disk."""

    def __init__(self, file: Path, total_minutes: float | None):
        self.file, self.values = file, dict[str, Any]()
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


def network(channels: Sequence[int] | None, layers: int, shape: Sequence[int]) -> dict[str, Any]:
    """Return the preset's network, or one of other widths; attention is at half of the resolution, as there."""
    found = {**get_preset("cifar10_fast").unet, "sample_size": shape[-1], "layers_per_block": layers}
    if channels:
        blocks = ["AttnDownBlock2D" if level == 1 else "DownBlock2D" for level in range(len(channels))]
        up = [block.replace("Down", "Up") for block in reversed(blocks)]
        found |= {"block_out_channels": tuple(channels), "down_block_types": blocks, "up_block_types": up}
    return found


def train(arguments: argparse.Namespace, rest: Sequence[str], shape: Sequence[int]) -> dict[str, Any] | None:
    """Train, and return what is worth knowing of it; `None` where it was stopped."""
    flags = ["--preset", "cifar10_fast", "--train_data_dir", str(arguments.data)]
    flags += ["--output_dir", str(arguments.output)]
    flags += ["--max_train_minutes", str(arguments.minutes), "--resolution", str(shape[-1])]
    # One checkpoint, at the end; a curve of bits/dim of images that are held out; grids by DDIM.
    flags += ["--checkpointing_steps", "1000000", "--sampler", "ddim", "--ddpm_num_inference_steps", "50"]
    flags += ["--validation_split", "0.01", "--validation_steps", "2000"]
    flags += ["--eval_num_images", "500", "--eval_num_evaluations", "20"]
    if arguments.channels or arguments.layers != 2:
        torch.manual_seed(0)
        unet = UNet2DModel(**network(arguments.channels, arguments.layers, shape))
        DDPMPipeline(unet, DDPMScheduler.from_preset("cifar10_fast")).save_pretrained(arguments.output / "start")
        flags += ["--init_from", str(arguments.output / "start")]
    config = parse_training_config([*flags, *rest])
    trainer = Trainer(config)
    started = time.monotonic()
    if trainer.train() is None:
        return None
    return {
        "updates": trainer.step,
        "images": trainer.step * trainer.plan.total,
        "seconds": round(time.monotonic() - started, 1),
        "device": str(trainer.device) if trainer.device.type != "cuda" else torch.cuda.get_device_name(),
        "computation": trainer.run.describe_computation(),
        "flags": {name: value for name, value in config.public_values().items() if name not in _PATHS},
    }


class Measurements:
    """What is measured of the model after the training; raises UserError before it: something does not fit."""

    def __init__(self, arguments: argparse.Namespace, shape: Sequence[int]):
        test = arguments.test or arguments.data.with_name("test.npz")
        files = {"train": arguments.data, "test": test} if test.exists() else {"train": arguments.data}
        options = {"channels": shape[0], "resolution": tuple(shape[1:])}
        self.sets = {split: load_images(train_data_dir=str(file), **options) for split, file in files.items()}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.metrics = [name.strip() for name in arguments.metrics.split(",")]
        self.options = EvaluationOptions(
            batch_size=arguments.batch_size,
            features=arguments.features,
            inception_weights=arguments.inception_weights,
            output=arguments.output / "evaluation",
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
        for chain in self.chains.values():
            check_evaluation(pipe, self.sets, self.metrics, replace(self.options, **chain))

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
    """Return this program's flags, and those of the training."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="train.npz")
    add("--test", type=Path, help="test.npz; default: beside --data")
    add("--minutes", type=float, default=8, help="of the training")
    add("--total_minutes", type=float, help="what has not begun by then is left out")
    add("--output", type=Path, default=Path("runs/cifar10-run"))
    add("--channels", type=int, nargs="+", help="of a smaller network, such as 32 64, for a CPU")
    add("--layers", type=int, default=2, help="residual blocks per resolution")
    add("--samples", type=int, default=10_000, help="by DDIM")
    add("--steps", type=int, default=50, help="of DDIM")
    add("--ancestral", type=int, default=1000, help="samples by the paper's sampler")
    add("--ancestral_steps", type=int, default=1000, help="its steps; the paper: 1000")
    add("--images", type=int, default=2000, help="test images for bits/dim, the first ones")
    add("--features", default="pixels", help="see ddpm-hf evaluate; several as inception,efficientnet-lite0")
    add("--inception_weights", type=Path, help="of --features inception")
    add("--metrics", default="fid,kid,prc,dc,mmd,sw,auth", help="of the samples")
    add("--batch_size", type=int, default=500, help="images at a time in evaluations")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 1 if a part failed, 2 if nothing could begin."""
    arguments, rest = parse(argv)
    with showing_flags():
        try:
            return run(arguments, rest)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train, measure and pack."""
    first = load_images(train_data_dir=str(arguments.data), channels=3, resolution=None)
    shape = tuple(first.batch(torch.tensor([0]))[0].shape[1:])
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.output / "run.json", arguments.total_minutes)
    measurements = Measurements(arguments, shape)
    if (training := train(arguments, rest, shape)) is None:
        return 130
    report.add("training", training)
    with report.part("curve") as due:
        if due:
            report.add("curve", json.loads((arguments.output / "curve.json").read_text()))
    with report.part("weights") as due:
        if due:
            size = pack(arguments.output, arguments.output / "parts")
            report.add("weights", {"bytes of all parts": size, "dtype": "bfloat16, rounded from float32"})
    measurements.make(arguments.output, report)
    for name in ("ddim", "bits_per_dim", "ancestral"):
        found = report.values[name]
        lines = found if isinstance(found, str) else {n: round(v["value"], 5) for n, v in found["values"].items()}
        print(f"{name}: {lines}")
    return int(any(isinstance(value, str) and value.startswith("failed") for value in report.values.values()))


if __name__ == "__main__":
    raise SystemExit(main())
