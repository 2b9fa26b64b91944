"""Digits 5 to 9 from a model of 0 to 4, and from the start: `python benchmarks/fine_tuning.py images FOLDER`

`images FOLDER` writes scikit-learn's digits as PNG files: FOLDER/digits-0-4 and FOLDER/digits-5-9, a folder for each
class. `table RUN...` prints the numbers that runs have measured after the same updates, each as mean and range over
the runs whose folders have the same name but for a number at the end (the seed).
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_images(folder: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / ("digits-0-4" if label < 5 else "digits-5-9") / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(path)


def print_table(runs: list[Path]) -> None:
    found: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        for step, numbers in json.loads((run / "evaluations.json").read_text()).items():
            for name, value in numbers.items():
                found.setdefault((re.sub(r"-?\d+$", "", run.name), name, int(step)), []).append(value)
    for (run, name, step), values in sorted(found.items()):
        spread = f"{min(values):.3f} to {max(values):.3f}, {len(values)} runs"
        print(f"{run} {name} after {step}: {np.mean(values):.3f} ({spread})")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "table"])
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    write_images(given.folders[0]) if given.what == "images" else print_table(given.folders)


if __name__ == "__main__":
    main(sys.argv[1:])
