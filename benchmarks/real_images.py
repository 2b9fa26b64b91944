"""What do the metrics see on real images? `python benchmarks/real_images.py CIFAR_FOLDER --output runs/real_images`

Compares the first `--count` training images of a random order with as many others: test images, other training
images, and these after damage of known kinds. Every metric of `ddpm-hf evaluate` that works on features is computed
for all `--features`, with FID, KID, precision and recall by independent code (scipy, torch-fidelity) beside it. Writes
`table.md`, `numbers.json` and `ladder.png`. CIFAR_FOLDER holds `train.npz` and `test.npz` (`images`, [N, H, W, 3]
uint8) and `labels.npz` (`train`).
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm.auto import tqdm

from ddpm_hf.evaluation.features import make_extractor
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.samples import SAMPLE_METRICS, Features, number_name
from ddpm_hf.utils.errors import UserError, showing_flags
from ddpm_hf.utils.files import write_text
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


def copies(images: Images, of: Images, share: float) -> Images:
    """Replace a share of the images by exact copies of others."""
    count = round(share * len(images))
    return np.concatenate([of[:count], images[count:]])


def grey(images: Images) -> Images:
    """Take the colours away."""
    return each(images, lambda image: image.convert("L").convert("RGB"))


def ladder(folder: Path, count: int, seed: int) -> tuple[Images, dict[str, Images]]:
    """Return the reference, and what is compared with it, each `count` images; raise UserError: not enough images."""
    train, test = (np.load(folder / f"{split}.npz")["images"] for split in ("train", "test"))
    labels = np.load(folder / "labels.npz")["train"]
    draw = np.random.RandomState(seed)
    order, of_test = draw.permutation(len(train)), draw.permutation(len(test))[:count]
    others = order[count:]
    without = others[labels[others] != labels.max()][:count]  # not the last class
    if min(len(others), len(of_test), len(without)) < count:
        raise UserError(f"--count {count} needs {2 * count} training images and more, and as many test images")
    reference, other = train[order[:count]], train[others[:count]]
    rows = {"test images": test[of_test], "other training images": other}
    rows |= {f"noise of {levels} levels": noise(other, levels) for levels in (2, 5, 10, 20)}
    rows |= {
        "blur of half a pixel": blur(other),
        "JPEG, quality 90": jpeg(other, 90),
        "JPEG, quality 75": jpeg(other, 75),
    }
    rows |= {f"{share:.0%} copies": copies(other, reference, share) for share in (0.01, 0.1)}
    return reference, {**rows, "one class missing": train[without], "grey": grey(other)}


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
    """Return FID, KID, precision and recall by scipy and torch-fidelity."""
    x, y = rows.double().numpy(), real.double().numpy()
    s_x, s_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(s_x @ s_y).real
    fid = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s_x + s_y - 2 * root)
    size = min(1000, min(len(x), len(y)) // 2)
    kid = kid_features_to_metric(rows, real, kid_subset_size=size, kid_subsets=100, rng_seed=2020, verbose=False)
    prc = prc_features_to_metric(rows.double(), real.double(), verbose=False)
    kid_name, fid_name = (number_name(what, name, None, "") for what in ("kid", "fid"))
    found = {fid_name: float(fid), kid_name: kid["kernel_inception_distance_mean"]}
    return found | {f"{what}_{name}": float(prc[what]) for what in ("precision", "recall")}


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
    add("--output", type=Path, default=Path("runs/real_images"))
    arguments = parser.parse_args(argv)
    try:
        reference, rows = ladder(arguments.folder, arguments.count, arguments.seed)
        shape = reference.shape[3], *reference.shape[1:3]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights, names = arguments.inception_weights, arguments.features.split(",")
        extractors = [make_extractor(name, shape, weights, device) for name in names]
    except UserError as error:
        with showing_flags():
            print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    shown = torch.from_numpy(np.stack([images[:SHOWN] for images in (reference, *rows.values())]))
    picture = labelled_grid(shown.permute(0, 1, 4, 2, 3), rows=["reference", *rows])
    save_picture(picture, arguments.output / "ladder.png")
    found: dict[str, dict[str, dict[str, float]]] = {}
    pages = [f"{arguments.count} images on each side, seed {arguments.seed}."]
    for extractor in extractors:
        real = features_of(extractor, reference, arguments.batch_size, "reference")
        of = found[extractor.name] = {}
        for name, images in rows.items():
            values = features_of(extractor, images, arguments.batch_size, name)
            of[name] = numbers(values, real, arguments.metrics.split(","), extractor.name)
            if name == "test images":
                of["test images, independent code"] = independent(values.values, real.values, extractor.name)
            write_text(arguments.output / "numbers.json", json.dumps(finite(found), indent=1) + "\n")
        columns = list(of["test images"])
        heads = [column.removesuffix(f"_{extractor.name}") for column in columns]
        lines = [["", *heads]]
        for name, values_of in of.items():
            lines.append([name, *(f"{values_of[c]:.4g}" if c in values_of else "-" for c in columns)])
        pages += [f"## {extractor.name}", f"{extractor.description}.", table(lines)]
        write_text(arguments.output / "table.md", "\n\n".join(pages) + "\n")
        print("\n\n".join(pages[-3:]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
