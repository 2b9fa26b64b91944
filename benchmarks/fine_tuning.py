"""Digits 5 to 9 from a model of 0 to 4, and from nothing: `python benchmarks/fine_tuning.py FOLDER`

Writes scikit-learn's digits as PNG files, trains a model of 0 to 4 and then, for each seed, 5 to 9 in both ways with
the same recipe (docs/fine_tuning.md), and prints what was measured after equal numbers of updates. What is finished is
not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

RECIPE = """# fine-tuning.yaml
preset: digits
validation_split: 0.15
eval_metrics: nll,fid
eval_features: pixels
eval_num_samples: 448
eval_num_evaluations: 20
sampler: ddim
ddpm_num_inference_steps: 25
"""
BASE = ["--train_data_dir", "digits-0-4", "--max_train_steps", "1200", "--output_dir", "runs/zero-to-four"]
SECOND = ["--train_data_dir", "digits-5-9", "--max_train_steps", "600", "--validation_steps", "200"]
SECOND += ["--lr_scheduler", "constant"]
STARTS = {"tuned": ["--init_from", "runs/zero-to-four"], "scratch": []}


def write_images(folder: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / ("digits-0-4" if label < 5 else "digits-5-9") / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(path)


def train(folder: Path, *flags: str) -> None:
    if not (folder / flags[flags.index("--output_dir") + 1] / "README.md").exists():
        again = "--config", "fine-tuning.yaml", "--resume_from_checkpoint", "latest"
        subprocess.run([sys.executable, "-m", "ddpm_hf.cli", "train", *again, *flags], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each kind")
    arguments = parser.parse_args()
    folder = arguments.folder
    if not (folder / "digits-5-9").exists():
        write_images(folder)
    (folder / "fine-tuning.yaml").write_text(RECIPE)
    train(folder, *BASE)
    found: dict[tuple[str, int, str], list[float]] = {}
    for seed in range(arguments.seeds):
        for name, start in STARTS.items():
            run = f"runs/{name}-{seed}"
            train(folder, *SECOND, *start, "--seed", str(seed), "--output_dir", run)
            for entry in json.loads((folder / run / "curve.json").read_text()):
                for number in entry.keys() - {"update", "images", "seconds"}:
                    found.setdefault((number, entry["update"], name), []).append(entry[number])
    for (number, step, name), values in sorted(found.items()):
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"{number} after {step} updates, {name}: {np.mean(values):.3f} ({each})")


if __name__ == "__main__":
    main()
