"""What do the metrics see on real images? `python benchmarks/real_images.py CIFAR_FOLDER --output runs/real_images`

Compares the first `--count` training images of a random order with as many others: test images, other training
images, and these after damage of known kinds. Every metric of `ddpm-hf evaluate` that works on features is computed
for all `--features`, with FID, KID, precision and recall by independent code (numpy, torch-fidelity) beside it. With
`--seeds 3` the images are chosen three times where they are not damaged, for the spread. Writes `table.md`,
`numbers.json`, `ladder.png` and, with several seeds, what each number sees, `seen_FEATURES.png`. CIFAR_FOLDER holds
`train.npz` and `test.npz` (`images`, [N, H, W, 3] uint8) and `labels.npz` (`train`). The features of all of them are
kept in the cache, as `ddpm-hf evaluate` keeps them.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm.auto import tqdm

from ddpm_hf.data import load_images
from ddpm_hf.evaluation.features import make_extractor
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.plots import figure_class, save_figure
from ddpm_hf.evaluation.run import parse_metrics
from ddpm_hf.evaluation.samples import SAMPLE_METRICS, Features, higher_is_better, number_name, real_images
from ddpm_hf.utils.errors import UserError, showing_flags
from ddpm_hf.utils.files import writable_folder, write_text
from ddpm_hf.utils.text import finite, table
from ddpm_hf.utils.visualize import labelled_grid, save_picture

LARGEST = 2048  # features from which FD-infinity, of 15 Frechet distances, takes too long
SHOWN = 10  # images of each row in the picture
Images = np.ndarray  # [N, H, W, 3] uint8


def noise(images: Images, levels: float) -> Images:
    """Add Gaussian noise of so many levels."""
    drawn = np.random.RandomState(0).normal(0, levels, images.shape)
    return (images + drawn).round().clip(0, 255).astype(np.uint8)


def each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    """Change every image by Pillow."""
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def blur(images: Images) -> Images:
    """Blur by a Gaussian of half a pixel."""
    return each(images, lambda image: image.filter(ImageFilter.GaussianBlur(0.5)))


def jpeg(images: Images, quality: int) -> Images:
    """Compress as JPEG and back."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return each(images, change)


def grey(images: Images) -> Images:
    """Take the colours away."""
    return each(images, lambda image: image.convert("L").convert("RGB"))


class Choice:
    """Which images are compared: the reference, and by row the split and the places of the others, undamaged."""

    def __init__(self, labels: np.ndarray, of_test: int, count: int, seed: int):
        draw = np.random.RandomState(seed)
        order, test = draw.permutation(len(labels)), draw.permutation(of_test)[:count]
        others = order[count:]
        without = others[labels[others] != labels.max()][:count]  # not the last class
        if min(len(others), len(test), len(without)) < count:
            raise UserError(f"--count {count} needs {2 * count} training images and more, and as many test images")
        self.reference, self.other = order[:count], others[:count]
        self.rows = {"test images": ("test", test), "other training images": ("train", self.other)}
        for share in (0.01, 0.1):
            copies = round(share * count)
            places = np.concatenate([self.reference[:copies], self.other[copies:]])
            self.rows[f"{share:.0%} copies"] = ("train", places)
        self.rows["one class missing"] = ("train", without)


def damaged(images: Images) -> dict[str, Images]:
    """Return the images after damage of several kinds."""
    found = {f"noise of {levels} levels": noise(images, levels) for levels in (2, 5, 10, 20)}
    found["blur of half a pixel"] = blur(images)
    found |= {f"JPEG, quality {quality}": jpeg(images, quality) for quality in (90, 75)}
    return found | {"grey": grey(images)}


def features_of(extractor: Any, images: Images, batch_size: int, name: str) -> Features:
    """Return the features of images."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        parts = [extractor(part)["features"].cpu() for part in tqdm(pixels.split(batch_size), desc=name, leave=False)]
    return Features(torch.cat(parts))


def numbers(rows: Features, real: Features, metrics: Sequence[str], name: str) -> dict[str, float]:
    """Return all numbers of one row."""
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "fid":  # without the error, which needs ten more
            found[number_name("fid", name, None, "")] = frechet_distance(rows.gaussian, real.gaussian)
        elif metric != "fd_infinity" or real.values.shape[1] <= LARGEST:
            estimates = SAMPLE_METRICS[metric].compute(rows, real)
            found |= {number_name(what, name, None, ""): estimate.value for what, estimate, *_ in estimates}
    return found


def independent(rows: Tensor, real: Tensor, name: str) -> dict[str, float]:
    """Return FID, KID, precision and recall by numpy and torch-fidelity."""
    x, y = rows.double().numpy(), real.double().numpy()
    s_x, s_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s_x @ s_y).real.clip(0)).sum()
    fid = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s_x + s_y) - 2 * root
    size = min(1000, min(len(x), len(y)) // 2)
    kid = kid_features_to_metric(rows, real, kid_subset_size=size, kid_subsets=100, rng_seed=2020, verbose=False)
    prc = prc_features_to_metric(rows.double(), real.double(), verbose=False)
    kid_name, fid_name = (number_name(what, name, None, "") for what in ("kid", "fid"))
    found = {fid_name: float(fid), kid_name: kid["kernel_inception_distance_mean"]}
    return found | {f"{what}_{name}": float(prc[what]) for what in ("precision", "recall")}


def page_of(found: dict[str, dict[str, list[float]]], extractor: Any) -> str:
    """Return the table of one extractor: means over the seeds, and their spread (one standard deviation)."""

    def cell(values: list[float] | None) -> str:
        if not values:
            return "-"
        spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
        return f"{np.mean(values):.4g}{spread}"

    columns = list(found["test images"])
    lines = [["", *(column.removesuffix(f"_{extractor.name}") for column in columns)]]
    lines += [[row, *(cell(values.get(column)) for column in columns)] for row, values in found.items()]
    return "\n\n".join([f"## {extractor.name}", f"{extractor.description}.", table(lines)])


def chart(found: dict[str, dict[str, list[float]]], name: str) -> Any:
    """Return a figure: how much worse than other training images each row looks to each number, in their spreads."""
    usual = found["other training images"]
    columns, rows = list(usual), [row for row in found if row != "other training images" and "code" not in row]
    seen = np.full((len(rows), len(columns)), np.nan)
    for j, column in enumerate(columns):
        sign = -1 if higher_is_better(column) else 1
        mean, spread = np.mean(usual[column]), np.std(usual[column], ddof=1) or np.nan
        for i, row in enumerate(rows):
            if column in found[row]:
                seen[i, j] = sign * (np.mean(found[row][column]) - mean) / spread
    figure = figure_class()(figsize=(9, 5.2), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    shown = np.sign(seen) * np.log10(1 + np.abs(seen))
    axes.imshow(shown, cmap="RdBu_r", vmin=-4, vmax=4, aspect="auto")
    axes.set_xticks(
        range(len(columns)), [column.removesuffix(f"_{name}") for column in columns], rotation=30, ha="right"
    )
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), value in np.ndenumerate(seen):
        text = "-" if np.isnan(value) else f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.1f}"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=9, color="white" if abs(shown[i, j]) > 2.4 else "black"
        )
    axes.set_title(f"How much worse than other training images, in their spreads ({name})")
    return figure


def compare(
    extractor: Any, sets: dict[str, Any], choices: Sequence[Choice], metrics: Sequence[str], batch_size: int
) -> Any:
    """Yield after every row all numbers so far: by row and name those of each choice."""
    options, name = EvaluationOptions(batch_size=batch_size, progress=True), extractor.name
    of = {split: real_images(split, images, [extractor], options).features for split, images in sets.items()}
    found: dict[str, dict[str, list[float]]] = {}

    def add(row: str, values: dict[str, float]) -> None:
        for number, value in values.items():
            found.setdefault(row, {}).setdefault(number, []).append(value)

    for i, choice in enumerate(choices):
        real = Features(of["train"][name][choice.reference])
        for row, (split, places) in choice.rows.items():
            rows = Features(of[split][name][places])
            add(row, numbers(rows, real, metrics, name))
            if row == "test images" and i == 0:
                add(f"{row}, independent code", independent(rows.values, real.values, name))
            yield found
        if i == 0:
            images = sets["train"].images.permute(0, 2, 3, 1).numpy()[choice.other]
            for row, changed in damaged(images).items():
                rows = features_of(extractor, changed, batch_size, row)
                add(row, numbers(rows, real, metrics, name))
                yield found


def main(argv: Sequence[str] | None = None) -> int:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path)
    add("--count", type=int, default=5000, help="images on each side")
    add("--features", default="efficientnet-lite0,pixels")
    add("--metrics", default="fid,fd_infinity,kid,prc,dc,mmd,sw,auth")
    add("--inception_weights", type=Path)
    add("--batch_size", type=int, default=100)
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--seeds", type=int, default=1, help="choices of images, with the seeds --seed, --seed + 1, ...")
    add("--output", type=Path, default=Path("runs/real_images"))
    arguments = parser.parse_args(argv)
    try:
        sets = {
            s: load_images(train_data_dir=str(arguments.folder / f"{s}.npz"), channels=3) for s in ("train", "test")
        }
        known = [name for name, metric in SAMPLE_METRICS.items() if metric.numbers and metric.of_real]
        metrics = parse_metrics(arguments.metrics, known)
        if arguments.count < 20 or min(arguments.seeds, arguments.batch_size) < 1:
            raise UserError("--count must be at least 20, --seeds and --batch_size at least 1")
        labels = None
        with suppress(OSError, ValueError, KeyError):
            labels = np.load(arguments.folder / "labels.npz")["train"]
        if labels is None or labels.shape != (len(sets["train"]),):
            raise UserError(f"{str(arguments.folder)!r} holds no labels.npz, the classes of train.npz as `train`")
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        choices = [Choice(labels, len(sets["test"]), arguments.count, seed) for seed in seeds]
        shape, device = tuple(sets["train"].images.shape[1:]), "cuda" if torch.cuda.is_available() else "cpu"
        weights, names = arguments.inception_weights, arguments.features.split(",")
        extractors = [make_extractor(name, shape, weights, device) for name in names]
        writable_folder(arguments.output, "--output")
    except UserError as error:
        with showing_flags():
            print(f"error: {error}", file=sys.stderr)
        return 2
    save_picture(picture_of(sets, choices[0]), arguments.output / "ladder.png")
    found: dict[str, Any] = {}
    pages = [f"{arguments.count} images on each side, seeds {seeds[0]} to {seeds[-1]}."]
    for extractor in extractors:
        for rows in compare(extractor, sets, choices, metrics, arguments.batch_size):
            found[extractor.name] = rows
            page = page_of(rows, extractor)
            write_text(arguments.output / "numbers.json", json.dumps(finite(found), indent=1) + "\n")
            write_text(arguments.output / "table.md", "\n\n".join([*pages, page]) + "\n")
        pages.append(page)
        if len(seeds) > 1:
            save_figure(chart(rows, extractor.name), arguments.output / f"seen_{extractor.name}.png")
        print(pages[-1], flush=True)
    return 0


def picture_of(sets: dict[str, Any], choice: Choice) -> Tensor:
    """Return the picture of some images of each row."""
    rows = {"reference": ("train", choice.reference), **choice.rows}
    shown = {name: sets[split].images[places[:SHOWN]] for name, (split, places) in rows.items()}
    other = shown["other training images"].permute(0, 2, 3, 1).numpy()
    shown |= {name: torch.from_numpy(images).permute(0, 3, 1, 2) for name, images in damaged(other).items()}
    return labelled_grid(torch.stack(list(shown.values())), rows=list(shown))


if __name__ == "__main__":
    raise SystemExit(main())
