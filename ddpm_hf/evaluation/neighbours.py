"""The nearest training images of samples (Figures 12, 15), and whether a model repeats its training images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plots
from .metrics import Memorisation, mean_estimate, memorisation, nearest_neighbours
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
    memorisation: Memorisation | None = None  # the comparison of the two


def find_neighbours(
    samples: Samples, train: RealImages, held_out: RealImages | None, spaces: list[str], k: int = 5
) -> list[Neighbours]:
    """Find the k nearest training images of the first samples, and of as many held-out images.

    They are compared by their pixels, and by the features of the extractors that `spaces` names.
    """
    found, n = [], len(samples.first)
    for space in dict.fromkeys(["pixels", *spaces]):
        queries = _pixels(samples.first) if space == "pixels" else samples.features[space, "uint8"][:n]
        neighbours = Neighbours(space, *_nearest(queries, _chunks(train, space), k))
        if held_out is not None:
            others = next(_chunks(held_out, space, KEPT_SAMPLES))
            neighbours.held_out = _nearest(others, _chunks(train, space), 1)[0][:, 0]
            neighbours.memorisation = memorisation(neighbours.distances[:, 0], neighbours.held_out)
        found.append(neighbours)
    return found


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 255


def _chunks(real: RealImages, space: str, size: int | None = None) -> Iterator[Tensor]:
    """Yield pixels or features of real images, `[at most size, D]`, in their order."""
    for rows in torch.arange(len(real.images)).split(size or _CHUNK):
        yield _pixels(real.images.batch(rows)[0]) if space == "pixels" else real.features[space][rows]


def _nearest(queries: Tensor, chunks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return distances and indices `[N, at most k]` of `nearest_neighbours` among all chunks."""
    best = torch.empty((len(queries), 0), dtype=torch.float64)
    place, start = torch.empty((len(queries), 0), dtype=torch.long), 0
    for chunk in chunks:
        distances, indices = nearest_neighbours(queries, chunk, min(k, len(chunk)))
        best, order = torch.cat([best, distances], 1).sort(dim=1, stable=True)
        place = torch.cat([place, start + indices], 1).gather(1, order)
        best, place, start = best[:, :k], place[:, :k], start + len(chunk)
    return best, place


def add_neighbours(report: EvaluationReport, found: list[Neighbours], train: RealImages, split: str | None) -> None:
    """Add to the report how new the samples are; `split` is the name of the held-out images, if there are any."""
    for neighbours in found:
        space, n = neighbours.space, len(neighbours.distances)
        words = f"{n} samples and the nearest of {len(train.images)} training images"
        how: dict[str, Any] = {"estimator": words, "features": space, "num_samples": n, "split": train.split}
        report.add(f"nearest_distance_{space}", *mean_estimate(neighbours.distances[:, 0]), how)
        if (m := neighbours.memorisation) is None:
            continue
        words = (
            f"chance that a sample is closer to the training images than an image of {split} is (1/2: as new as "
            f"those); {m.below_median} of {m.num_samples} are closer than the median of {m.num_held_out} such images, "
            f"{m.below_closest} than all of them, {m.copies} are copies"
        )
        more = {key: getattr(m, key) for key in ("below_median", "below_closest", "copies", "num_held_out")}
        report.add(f"memorisation_{space}", *m.closer, {**how, "estimator": words, "split": split}, **more)
        if m.copies:
            report.warnings.append(f"{m.copies} of {m.num_samples} samples equal a training image in {space}")
        elif m.closer.value > 0.6 and m.closer.value - 4 * m.closer.standard_error > 0.5:
            report.warnings.append(
                f"samples are closer to the training images than {split} images are ({space}: {m.closer.value:.2f} "
                "instead of 0.5): the model may repeat training images"
            )
    if split is None:
        report.warnings.append("no held-out images, so there is nothing to judge the nearest distances by")


def save_neighbours(
    samples: Samples, train: RealImages, found: list[Neighbours], output: Path, split: str | None
) -> list[str]:
    """Draw the first samples and their neighbours, and a plot of distances, per space; return the files' names."""
    figures = {}
    for near in found:
        indices = near.indices[:8]
        images = train.images.batch(indices.flatten())[0].unflatten(0, indices.shape)
        title = f"Samples and their nearest training images ({near.space})"
        figure = plots.neighbours_figure(samples.first[:8], images, near.distances[:8], title)
        figures[f"neighbours_{near.space}.png"] = figure
        if near.held_out is not None:
            title, name = f"How new the samples are ({near.space})", f"images of {split}"
            figure = plots.distances_figure(near.distances[:, 0], near.held_out, name, title)
            figures[f"distances_{near.space}.png"] = figure
    for name, figure in figures.items():
        plots.save_figure(figure, output / name)
    return list(figures)
