"""Samples of a model beside real images: FID, IS, KID, precision and recall, nearest neighbours.

Samples and real images are turned into features batch by batch, in any number of processes. Only the first samples are
kept as images. Every finished batch is on disk, so an interrupted evaluation goes on, and real images are read once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..pipelines.pipeline_ddpm import DDPMPipeline, without_bar
from ..sampling.shards import all_rows, read_tensors, write_tensors
from ..utils.digests import digest, images_digest, weights_digest
from ..utils.errors import UserError
from ..utils.processes import from_first, processes, together
from ..utils.randomness import derived_generator
from .features import FeatureExtractor
from .metrics import (
    Estimate,
    FrechetStatistics,
    Memorisation,
    frechet_distance,
    frechet_statistics,
    inception_score,
    jackknife,
    kernel_distance,
    leaving_out,
    memorisation,
    nearest_neighbours,
    precision_recall,
)
from .report import EvaluationReport

# What the paper's FID, IS and KID are computed from.
PAPER_SAMPLES = 50_000
# The first samples are kept as images, for pictures and for neighbours among the training images.
KEPT_SAMPLES = 1000
_CHUNK = 4096  # real images that are compared with samples at a time


class ImageSet(Protocol):
    """What `data.load_images` gives, but for streams."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]: ...


@dataclass
class RealImages:
    """Real images, and their features by the names of the extractors.

    Attributes:
        split: `train`, `validation`, ...
        images: The images themselves.
        features: Name to `[N, D]` float32.
        fingerprints: Name to a hash of images, preprocessing and weights.
    """

    split: str
    images: Any
    features: dict[str, Tensor]
    fingerprints: dict[str, str]


@dataclass
class Samples:
    """What is kept of the samples.

    Attributes:
        count: N.
        first: The first ones as images, `[n, C, H, W]` uint8.
        features: (extractor, `uint8` or `float`) to `[N, D]` float32.
        logits: The same, for extractors that are classifiers.
        settings: How they were drawn.
    """

    count: int
    first: Tensor
    features: dict[tuple[str, str], Tensor]
    logits: dict[tuple[str, str], Tensor]
    settings: dict[str, Any]


@dataclass
class Neighbours:
    """The real images that are nearest to samples.

    Attributes:
        space: `pixels`, or the extractor's name.
        distances, indices: `[n, k]`, of the first samples among the training images, nearest first.
        held_out: `[m]`, distances of held-out images to their nearest training images, or `None`.
        memorisation: The comparison of the two, or `None`.
    """

    space: str
    distances: Tensor
    indices: Tensor
    held_out: Tensor | None
    memorisation: Memorisation | None


def real_images(
    split: str,
    images: ImageSet,
    extractors: list[FeatureExtractor],
    cache_dir: Path,
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> RealImages:
    """Features of real images, from the cache or into it.

    The cache's key is a hash of the pixels, the preprocessing and the weights, so that nothing stale is found.

    Raises:
        ValueError: Fewer than two images.
    """
    if len(images) < 2:
        raise UserError(f"samples are compared with real images, and {images.name!r} ({split}) has {len(images)}")
    content = ""
    with together():
        if processes().is_main_process:
            content = images_digest(images)
    content = from_first(content)
    found, keys = {}, {}
    for extractor in extractors:
        key = digest(content, extractor.fingerprint)

        def features_of(ids: list[int], extractor: FeatureExtractor = extractor) -> dict[str, Tensor]:
            return {"features": extractor(images.batch(torch.tensor(ids))[0])["features"]}

        with torch.no_grad():
            rows = all_rows(
                len(images),
                features_of,
                batch_size=batch_size,
                folder=cache_dir / "features" / key,
                desc=f"{extractor.name} features, {split}",
                progress=progress,
            )
        found[extractor.name], keys[extractor.name] = rows["features"], key
    return RealImages(split, images, found, keys)


def real_statistics(real: RealImages, name: str, cache_dir: Path, device: torch.device) -> FrechetStatistics:
    """Mean and covariance of real images' features, from the cache or into it. For the first process."""
    file = cache_dir / "statistics" / f"{real.fingerprints[name]}.safetensors"
    there = read_tensors(file)
    if there is None or set(there) != {"mean", "factor"}:
        made = frechet_statistics(real.features[name].to(device))
        there = {"mean": made.mean.cpu(), "factor": made.factor.cpu()}
        write_tensors(file, there)
    return FrechetStatistics(there["mean"].to(device), there["factor"].to(device), len(real.features[name]))


def _labels_of_samples(
    pipe: DDPMPipeline, labels: Tensor | None, class_names: list[str] | None, seed: int
) -> tuple[Any, str | None]:
    """Ids of samples to their class labels, and that rule in words."""
    classes = pipe.classes
    if classes.count is None:
        return (lambda ids: None), None
    if labels is not None and len(labels):
        table = classes.of_names(class_names)

        def frequent(ids: list[int]) -> list[int]:
            drawn = (torch.randint(len(labels), (), generator=derived_generator(seed, "class", i)) for i in ids)
            return [table[int(labels[int(j)])] for j in drawn]

        return frequent, "drawn with the frequencies of the training images"
    if classes.null is not None:
        return (lambda ids: [None] * len(ids)), "none: the label that stands for no class"
    return (lambda ids: [ClassIndex(i % classes.count) for i in ids]), f"in turn, 0..{classes.count - 1}"


def draw_samples(
    pipe: DDPMPipeline,
    count: int,
    extractors: list[FeatureExtractor],
    work_dir: Path,
    *,
    seed: int = 0,
    batch_size: int = 256,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    guidance_scale: float = 1.0,
    train: ImageSet | None = None,
    progress: bool = False,
) -> Samples:
    """Draw samples and keep their features, as the floats that the sampler gives and as whole pixel values.

    Args:
        pipe: Network and sampler.
        count: How many; sample i is what the seed `seed + i` gives.
        extractors: What to keep of them.
        work_dir: Where finished batches are kept; an interrupted run goes on from there.
        seed: Of the first sample.
        batch_size: Images at a time; does not change them.
        num_inference_steps: Of the sampler; the chain's T by default.
        eta, guidance_scale: See `DDPMPipeline`.
        train: The training images, whose class frequencies a class-conditional network is sampled with.
        progress: Show a progress bar.

    Raises:
        ValueError: A count or number of steps out of range; classes that the network does not know.
    """
    if count < 1:
        raise UserError(f"num_samples must be at least 1, got {count}")
    steps = pipe.checked_steps(num_inference_steps)
    labels = None if train is None else train.labels
    labels_of, labels_rule = _labels_of_samples(pipe, labels, getattr(train, "class_names", None), seed)
    sampling: dict[str, Any] = {
        "sampler": type(pipe.scheduler).__name__,
        "num_inference_steps": steps,
        "eta": pipe.checked_eta(eta),
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        "dtype": pipe.settings["dtype"],
    }
    if labels_rule is not None:
        sampling["class_labels"] = labels_rule
    seen_labels = None
    if labels_rule is not None and labels is not None:
        seen_labels = digest(labels, getattr(train, "class_names", None))
    fingerprints = [extractor.fingerprint for extractor in extractors]
    key = digest(weights_digest(pipe.unet), pipe.settings, sampling, seen_labels, fingerprints)

    def rows_of(ids: list[int], keep_images: bool) -> dict[str, Tensor]:
        chosen = labels_of(ids)
        options = {} if chosen is None else {"class_labels": chosen}
        with without_bar(pipe):
            (drawn,) = pipe(
                seeds=[seed + i for i in ids],
                num_inference_steps=num_inference_steps,
                eta=eta,
                guidance_scale=guidance_scale,
                output_type="pt",
                return_dict=False,
                **options,
            )
        grey_levels = drawn.float() * 255
        whole = grey_levels.round().to(torch.uint8)
        rows = {"images": whole} if keep_images else {}
        for extractor in extractors:
            for kind, images in (("uint8", whole), ("float", grey_levels)):
                if kind == "uint8" or extractor.takes_floats:
                    for what, value in extractor(images).items():
                        rows[f"{extractor.name}/{kind}/{what}"] = value
        return rows

    first = min(count, KEPT_SAMPLES)
    common: dict[str, Any] = {"batch_size": batch_size, "desc": f"sampling, {steps} steps", "progress": progress}
    with torch.no_grad():
        rows = all_rows(first, lambda ids: rows_of(ids, True), folder=work_dir / key[:16] / "first", **common)
        if count > first:
            rest = all_rows(
                count - first,
                lambda ids: rows_of([first + i for i in ids], False),
                folder=work_dir / key[:16] / "rest",
                **common,
            )
            for name, value in rest.items():
                rows[name] = torch.cat([rows[name], value])
    images = rows.pop("images")
    # In one order, whether they were made now or come from disk.
    parts = {tuple(name.rsplit("/", 2)): rows[name] for name in sorted(rows)}
    return Samples(
        count,
        images,
        {(name, kind): value for (name, kind, what), value in parts.items() if what == "features"},
        {(name, kind): value for (name, kind, what), value in parts.items() if what == "logits"},
        {**sampling, "num_samples": count, "seeds": f"{seed}-{seed + count - 1}"},
    )


def add_sample_metrics(
    report: EvaluationReport,
    metrics: list[str],
    samples: Samples,
    references: list[RealImages],
    cache_dir: Path,
    device: torch.device,
) -> None:
    """FID, IS, KID, precision and recall of samples against each set of real images into the report.

    Names say what was compared: `fid_inception_train_float`, `kid_inception_validation_uint8`; with other features
    than Inception's FID is called `fd` and KID `kd`.
    """
    biases: dict[str, float] = {}
    for (name, kind), features in samples.features.items():
        common = {"features": name, "sample_values": kind, "num_samples": samples.count}
        x = features.to(device)
        # Once for all sets of real images: with 50,000 samples this is the long part.
        gaussians = [frechet_statistics(part) for part in leaving_out(x)] if "fid" in metrics else []
        if "is" in metrics and (name, kind) in samples.logits:
            started = time.monotonic()
            estimate, deviation = inception_score(samples.logits[name, kind].to(device))
            settings = {"estimator": f"{samples.count} samples ({kind}), 10 parts", **common}
            settings["seconds"] = round(time.monotonic() - started, 2)
            report.add(f"is_{name}_{kind}", *_pair(estimate), settings, standard_deviation=deviation)
        for real in references:
            y = real.features[name]
            against = {**common, "split": real.split, "num_real": len(y), "statistics": real.fingerprints[name]}
            words = f"{samples.count} samples ({kind}) against {len(y)} images of {real.split}, {name} features"
            where = f"{name}_{real.split}_{kind}"
            started = time.monotonic()
            if "fid" in metrics:
                reference = real_statistics(real, name, cache_dir, device)
                estimate, bias = jackknife([frechet_distance(gaussian, reference) for gaussian in gaussians])
                key = ("fid_" if name == "inception" else "fd_") + where
                report.add(key, *_pair(estimate), {"estimator": words, **against}, estimated_bias=bias)
                report.settings[key]["seconds"] = round(time.monotonic() - started, 2)
                biases[key] = bias
            if kind == "float":  # the other numbers are defined for whole pixel values
                continue
            started = time.monotonic()
            if "kid" in metrics:
                estimate, size = kernel_distance(x, y.to(device))
                key = ("kid_" if name == "inception" else "kd_") + where
                settings = {"estimator": f"{words}, 100 subsets of {size}", **against, "subset_size": size}
                report.add(key, *_pair(estimate), settings)
                report.settings[key]["seconds"] = round(time.monotonic() - started, 2)
            started = time.monotonic()
            if "prc" in metrics:
                for what, estimate in zip(("precision", "recall"), precision_recall(x, y.to(device)), strict=True):
                    settings = {"estimator": f"{words}, third neighbour", **against, "neighbour": 3}
                    settings["seconds"] = round(time.monotonic() - started, 2)
                    report.add(f"{what}_{where}", *_pair(estimate), settings)
    sizes = {name: features.shape[1] for (name, _), features in samples.features.items()}
    _warn_of_bias(report, samples.count, biases, sizes)


def _pair(estimate: Estimate) -> tuple[float, float]:
    return estimate.value, estimate.standard_error


def _warn_of_bias(report: EvaluationReport, count: int, biases: dict[str, float], sizes: dict[str, int]) -> None:
    """Fewer samples make every Frechet distance larger, whatever the model."""
    if count >= PAPER_SAMPLES or not biases:
        return
    by = ", ".join(f"{key} by about {bias:.3g}" for key, bias in biases.items() if math.isfinite(bias))
    report.warnings.append(
        f"FID and other Frechet distances from {count} samples are biased upwards (the paper takes {PAPER_SAMPLES})"
        + (f": {by}, a jackknife estimates" if by else "")
        + "; compare them only with numbers from as many samples"
    )
    for name, size in sizes.items():
        if count <= size:
            report.warnings.append(
                f"{count} samples are too few to know the covariance of {size} {name} features; take more than {size}"
            )


def find_neighbours(
    samples: Samples, train: RealImages, held_out: RealImages | None, spaces: list[str], k: int = 5
) -> list[Neighbours]:
    """The nearest training images of the first samples, and of as many held-out images, by pixels and by features.

    Args:
        samples: Their kept images, and features of whole pixel values.
        train, held_out: Real images.
        spaces: Extractors to compare with, besides the pixels.
        k: How many neighbours.
    """
    k = min(k, len(train.images))
    n = len(samples.first)
    rows = torch.arange(min(KEPT_SAMPLES, len(held_out.images))) if held_out is not None else None
    found = []
    for space in dict.fromkeys(["pixels", *spaces]):
        if space == "pixels":
            distances, indices = _nearest_in(samples.first, train.images, k)
            away = None if held_out is None else _nearest_in(held_out.images.batch(rows)[0], train.images, 1)[0]
        else:
            real = train.features[space]
            distances, indices = nearest_neighbours(samples.features[space, "uint8"][:n], real, k)
            away = None
            if held_out is not None and rows is not None:
                away = nearest_neighbours(held_out.features[space][rows], real, 1)[0]
        away = None if away is None else away[:, 0]
        verdict = None if away is None else memorisation(distances[:, 0], away)
        found.append(Neighbours(space, distances, indices, away, verdict))
    return found


def _nearest_in(queries: Tensor, images: ImageSet, k: int) -> tuple[Tensor, Tensor]:
    """As `nearest_neighbours`, by pixels in [0, 1], among images that are read in chunks."""
    x = queries.flatten(1).double() / 255
    best = torch.full((len(x), 0), math.inf, dtype=torch.float64)
    place = torch.empty((len(x), 0), dtype=torch.long)
    for rows in torch.arange(len(images)).split(_CHUNK):
        y = images.batch(rows)[0].flatten(1).double() / 255
        distances, indices = nearest_neighbours(x, y, min(k, len(rows)))
        best, place = torch.cat([best, distances], 1), torch.cat([place, rows[indices]], 1)
        best, order = best.sort(dim=1, stable=True)
        best, place = best[:, :k], place.gather(1, order)[:, :k]
    return best, place


def add_neighbours(report: EvaluationReport, found: list[Neighbours], train: RealImages, split: str | None) -> None:
    """How new the samples are, into the report."""
    for neighbours in found:
        words = f"{len(neighbours.distances)} samples and the nearest of {len(train.images)} training images"
        common = {"features": neighbours.space, "num_samples": len(neighbours.distances)}
        settings: dict[str, Any] = {"estimator": words, **common, "split": train.split}
        nearest = neighbours.distances[:, 0]
        error = nearest.std().item() / math.sqrt(len(nearest)) if len(nearest) > 1 else math.nan
        report.add(f"nearest_distance_{neighbours.space}", nearest.mean().item(), error, settings)
        if (m := neighbours.memorisation) is None:
            continue
        words = (
            f"chance that a sample is closer to the training images than an image of {split} is (1/2: as new as "
            f"those); {m.below_median} of {m.num_samples} are closer than the median of {m.num_held_out} such images, "
            f"{m.below_closest} than all of them, {m.copies} are copies"
        )
        report.add(
            f"memorisation_{neighbours.space}",
            *_pair(m.closer),
            {"estimator": words, **common, "split": split},
            below_median=m.below_median,
            below_closest=m.below_closest,
            copies=m.copies,
            num_held_out=m.num_held_out,
        )
        if m.copies:
            report.warnings.append(
                f"{m.copies} of {m.num_samples} samples equal a training image in {neighbours.space}"
            )
        elif m.closer.value - 4 * m.closer.standard_error > 0.5 and m.closer.value > 0.6:
            report.warnings.append(
                f"samples are closer to the training images than {split} images are ({neighbours.space}: "
                f"{m.closer.value:.2f} instead of 0.5): the model may repeat training images"
            )
    if split is None:
        report.warnings.append("no held-out images, so there is nothing to judge the nearest distances by")
