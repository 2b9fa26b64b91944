"""What do the values of `cifar10_fast` do in a short run? `python benchmarks/fast_recipe.py train.npz --output FOLDER`

Trains a small network on CIFAR-10 at 8x8 with the preset's recipe, as far as it can be tried on a CPU, and with one
value changed at a time, for several seeds. All runs of a seed start from the same weights and see the same images and
noise; all are measured on the same held-out images and by samples from the same noise (bits/dim, and the Frechet
distance of pixels to the training images), so that their differences from the preset's run are what is compared. Other
EMA lengths come from the preset's runs (`ddpm-hf ema --sweep`). Writes `table.md` and `numbers.json`; what is finished
is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
from cifar10_run import network

from ddpm_hf import DDPMPipeline, DDPMScheduler, UNet2DModel
from ddpm_hf.utils.files import write_text
from ddpm_hf.utils.text import table

PRESET, SIZE = "the preset's values", 8
HELD_OUT = ["--validation_split", "0.02"]
# The preset's peak learning rate is for 35.7 million parameters; its 500 updates of warm-up are for some 20,000.
RECIPE = ["--resolution", str(SIZE), "--total_batch_size", "32", "--learning_rate", "2e-3", *HELD_OUT]
RECIPE += ["--eval_num_images", "0", "--sampler", "ddim", "--ddpm_num_inference_steps", "25"]
MEASURED = ["--metrics", "nll,fid", "--num_images", "500", "--num_evaluations", "10", *HELD_OUT]
MEASURED += ["--features", "pixels", "--num_samples", "1000", "--sampler", "ddim", "--num_inference_steps", "25"]
NUMBERS = ("bits_per_dim", "fd_pixels_train_uint8")
LENGTHS = ["--sigma_rel", "0.03,0.05,0.1,0.15,0.2"]
# One value changed, by the name of the row.
CHANGES = {
    PRESET: [],
    "constant": ["--lr_scheduler", "constant"],
    "linear to 0": ["--lr_scheduler", "linear"],
    "half the peak": ["--learning_rate", "1e-3"],
    "half the peak, constant": ["--learning_rate", "1e-3", "--lr_scheduler", "constant"],
    "twice the peak": ["--learning_rate", "4e-3"],
    "twice the peak, constant": ["--learning_rate", "4e-3", "--lr_scheduler", "constant"],
    "four times the peak": ["--learning_rate", "8e-3"],
    "no warm-up": ["--lr_warmup_steps", "0"],
    "uniform t": ["--timestep_sampling", "uniform"],
    "dropout 0.1": ["--dropout", "0.1"],
}
Numbers = dict[str, float]


def command(*flags: str, log: Path) -> None:
    """Run `ddpm-hf` on one thread, or end with where it says what is wrong; what it prints goes into a file."""
    with log.open("a") as file:
        made = [sys.executable, "-m", "ddpm_hf.cli", *flags]
        done = subprocess.run(made, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"ddpm-hf {flags[0]} failed, as {log} says at its end")


def run(row: str, seed: int, arguments: argparse.Namespace) -> dict[str, Numbers]:
    """Return the numbers of a run, which is made where there is none, and those of the preset's other EMA lengths."""
    name = f"{row.replace(' ', '-').replace(',', '')}-{seed}"
    folder, log = arguments.output / name, arguments.output / f"{name}.log"
    images = ["--train_data_dir", str(arguments.data)]
    if not (folder / "README.md").exists():
        flags = ["--preset", "cifar10_fast", *images, *RECIPE, "--max_train_steps", str(arguments.updates)]
        flags += ["--lr_warmup_steps", str(arguments.updates // 40)]
        flags += ["--init_from", str(arguments.output / f"start-{seed}"), "--seed", str(seed), *CHANGES[row]]
        command("train", *flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest", log=log)
    if row == PRESET:
        if not (file := folder / "ema_sweep" / "sweep.json").exists():
            command("ema", str(folder), "--sweep", *LENGTHS, *images, *MEASURED, log=log)
        measured = {f"EMA of sigma_rel {key}": value for key, value in json.loads(file.read_text())["values"].items()}
        found = {PRESET: measured.popitem()[1], **measured}  # the last is the run's own EMA
    else:
        if not (file := folder / "measured" / "report.json").exists():
            command("evaluate", "--model", str(folder), *images, *MEASURED, "--output", str(file.parent), log=log)
        found = {row: json.loads(file.read_text())["values"]}
    numbers = {name: {number: values[number]["value"] for number in NUMBERS} for name, values in found.items()}
    print(f"seed {seed}: {numbers}", flush=True)
    return numbers


def page(found: dict[str, list[Numbers]], arguments: argparse.Namespace) -> str:
    """Return the table: by row the means over the seeds, and the differences from the preset's runs."""
    lines = [["", *(text for number in NUMBERS for text in (number, "less the preset's"))]]
    for row, runs in found.items():
        lines.append([row])
        for number in NUMBERS:
            differences = [a[number] - b[number] for a, b in zip(runs, found[PRESET], strict=True)]
            spread = f" ± {stdev(differences):.3f}" if len(runs) > 1 else ""
            less = "" if row == PRESET else f"{mean(differences):+.3f}{spread}"
            lines[-1] += [f"{mean(values[number] for values in runs):.3f}", less]
    made = f"{arguments.updates} updates of 32 images at {SIZE}x{SIZE}, seeds 0 to {arguments.seeds - 1}"
    return f"{made}; ± is the standard deviation of the differences over the seeds.\n\n{table(lines)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="train.npz: `images`, [N, H, W, 3] uint8")
    parser.add_argument("--output", type=Path, default=Path("runs/fast_recipe"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2500)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one thread")
    arguments = parser.parse_args(argv)
    if not arguments.data.is_file():
        parser.error(f"{str(arguments.data)!r} is no file; give CIFAR-10's training images, train.npz")
    if min(arguments.seeds, arguments.updates, arguments.jobs) < 1:
        parser.error("--seeds, --updates and --jobs must be at least 1")
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        unet = UNet2DModel(**network([32, 32], 1, (3, SIZE, SIZE)))
        start = DDPMPipeline(unet, DDPMScheduler.from_preset("cifar10_fast"))
        start.save_pretrained(arguments.output / f"start-{seed}")
    found: dict[str, list[Numbers]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        made = [pool.submit(run, row, seed, arguments) for seed in range(arguments.seeds) for row in CHANGES]
        try:
            for row, numbers in (pair for runs in made for pair in runs.result().items()):
                found.setdefault(row, []).append(numbers)
        finally:
            pool.shutdown(cancel_futures=True)
    write_text(arguments.output / "numbers.json", json.dumps(found, indent=1) + "\n")
    text = page(found, arguments)
    write_text(arguments.output / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
