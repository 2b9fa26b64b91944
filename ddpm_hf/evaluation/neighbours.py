"""The nearest training images of samples (Figures 12, 15), and whether a model repeats its training images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.progress import in_parts
from ..utils.visualize import labelled_grid, save_picture
from .distances import nearest_neighbours
from .metrics import mean_estimate, memorisation
from .report import EvaluationReport
from .samples import KEPT_SAMPLES, RealImages, Samples

_CHUNK = 4096  # real images that are compared with samples at a time


@dataclass
class Neighbours:
    """The training images that are nearest to the first samples."""

    space: str  # pixels, or the extractor's name
    distances: Tensor  # [n, k], nearest first
    indices: Tensor  # [n, k]
    held_out: Tensor | None = None  # [m], distances of held-out images to their nearest training images


def find_neighbours(
    samples: Samples, train: RealImages, held_out: RealImages | None, spaces: list[str], k: int = 5
) -> list[Neighbours]:
    """Find the k nearest training images of the first samples, and of as many held-out images.

    They are compared by their pixels, and by the features of the extractors that `spaces` names.
    """
    found, n = [], len(samples.first)
    for space in dict.fromkeys(["pixels", *spaces]):
        queries = _pixels(samples.first) if space == "pixels" else samples.features[space, "uint8"][:n]
        neighbours = Neighbours(space, *_nearest(queries, train, space, k))
        if held_out is not None:
            others = _rows(held_out, space, torch.arange(len(held_out.images))[:KEPT_SAMPLES])
            neighbours.held_out = _nearest(others, train, space, 1)[0][:, 0]
        found.append(neighbours)
    return found


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 255


def _rows(real: RealImages, space: str, rows: Tensor) -> Tensor:
    """Return pixels or features of some real images, `[N, D]`."""
    return _pixels(real.images.batch(rows)[0]) if space == "pixels" else real.features[space][rows]


def _nearest(queries: Tensor, real: RealImages, space: str, k: int) -> tuple[Tensor, Tensor]:
    """Return distances and indices `[N, at most k]` of `nearest_neighbours`, a part of the real images at a time."""
    best = torch.empty((len(queries), 0), dtype=torch.float64)
    place = torch.empty((len(queries), 0), dtype=torch.long)
    for rows in in_parts(torch.arange(len(real.images)).split(_CHUNK), f"neighbours, {space}"):
        distances, indices = nearest_neighbours(queries, _rows(real, space, rows), min(k, len(rows)))
        best, order = torch.cat([best, distances], 1).sort(dim=1, stable=True)
        place = torch.cat([place, rows[indices]], 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best.sqrt(), place


def add_neighbours(report: EvaluationReport, found: list[Neighbours], train: RealImages, split: str | None) -> None:
    """Add to the report how new the samples are; `split` is the name of the held-out images, if there are any."""
    for near in found:
        space, nearest, held_out = near.space, near.distances[:, 0], near.held_out
        words, n = f"{len(nearest)} samples and the nearest of {len(train.images)} training images", len(nearest)
        how: dict[str, Any] = {"estimator": words, "features": space, "num_samples": n, "split": train.split}
        report.add(f"nearest_distance_{space}", *mean_estimate(nearest), how)
        if held_out is None:
            continue
        closer, copies = memorisation(nearest, held_out), int((nearest == 0).sum())
        words = f"chance that one of {n} samples is closer to the training images than one of {len(held_out)} images "
        words += f"of {split} is (1/2: as new as those); {copies} are copies"
        how = how | {"estimator": words, "split": split}
        report.add(f"memorisation_{space}", *closer, how, copies=copies, num_held_out=len(held_out))
        if copies:
            report.warnings.append(f"{copies} of {n} samples equal a training image in {space}")
        elif closer.value > 0.6 and closer.value - 4 * closer.standard_error > 0.5:
            report.warnings.append(
                f"samples are closer to the training images than {split} images are ({space}: {closer.value:.2f} "
                "instead of 0.5): the model may repeat training images"
            )
    if split is None:
        report.warnings.append("no held-out images, so there is nothing to judge the nearest distances by")


def save_neighbours(samples: Samples, train: RealImages, found: list[Neighbours], output: Path) -> list[str]:
    """Draw the first samples, their neighbours and the nearest distances, one picture per space; return the names."""
    for near in found:
        indices = near.indices[:8]
        images = train.images.batch(indices.flatten())[0].unflatten(0, indices.shape)  # [n, k, C, H, W]
        columns = ["sample", "nearest", *(f"no. {i}" for i in range(2, indices.shape[1] + 1))]
        rows = [f"{distance:.3g}" for distance in near.distances[:8, 0].tolist()]
        title = f"Samples and their nearest training images ({near.space})"
        picture = labelled_grid(torch.cat([samples.first[:8, None], images], 1), rows, columns, title)
        save_picture(picture, output / f"neighbours_{near.space}.png")
    return [f"neighbours_{near.space}.png" for near in found]
