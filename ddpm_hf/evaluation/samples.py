"""Samples of a model beside real images: their features, then FID, IS, KID, precision and recall.

Features are computed batch by batch, in any number of processes; every finished batch is on disk, so an interrupted
evaluation resumes. Only the first samples are kept as images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..pipelines.pipeline_ddpm import DDPMPipeline, without_bar
from ..pipelines.schedulers import checked_eta, checked_steps
from ..sampling.shards import Rows, all_rows, read_tensors, write_tensors
from ..utils.digests import digest, images_digest, weights_digest
from ..utils.errors import UserError
from ..utils.processes import from_first, processes, raise_on_all_ranks
from ..utils.randomness import derived_generator
from . import metrics
from .features import FeatureExtractor
from .options import EvaluationOptions
from .report import EvaluationReport, describe_pipeline

PAPER_SAMPLES = 50_000  # what the paper's FID and IS are computed from
KEPT_SAMPLES = 1000  # so many are kept as images, for pictures and for neighbours among the training images
# A number's name, its value and error, how it was made, and what else is known of it.
Measured = tuple[str, metrics.Estimate, dict[str, Any], dict[str, float]]


@dataclass
class RealImages:
    """Real images of a split and their features, by the name of what computed them."""

    split: str  # train, validation, ...
    images: Any  # an image dataset with `len` and `batch`, not a stream
    features: dict[str, Tensor] = field(default_factory=dict)  # [N, D] float32
    fingerprints: dict[str, str] = field(default_factory=dict)  # hashes of images, preprocessing and weights


@dataclass
class Samples:
    """What is kept of samples; features and logits by the extractor's name and `uint8` or `float`."""

    count: int  # N
    first: Tensor  # the first ones as images, [n, C, H, W] uint8
    features: dict[tuple[str, str], Tensor]  # [N, D] float32
    logits: dict[tuple[str, str], Tensor]  # [N, classes] float32
    settings: dict[str, Any]  # how they were drawn


@torch.no_grad()
def real_images(split: str, images: Any, extractors: list[FeatureExtractor], options: EvaluationOptions) -> RealImages:
    """Compute features of real images, or read them from the cache by a hash of pixels, preprocessing and weights."""
    with raise_on_all_ranks():
        content = images_digest(images) if processes().is_main_process else ""
    content = from_first(content)
    real = RealImages(split, images)
    for extractor in extractors:
        key = digest(content, extractor.fingerprint)

        def features_of(ids: list[int], extractor: FeatureExtractor = extractor) -> Rows:
            return {"features": extractor(images.batch(torch.tensor(ids))[0])["features"]}

        rows = all_rows(
            len(images),
            features_of,
            batch_size=options.batch_size,
            folder=options.cache_dir / "features" / key,
            desc=f"{extractor.name} features, {split}",
            progress=options.progress,
        )
        real.features[extractor.name], real.fingerprints[extractor.name] = rows["features"], key
    return real


def real_statistics(real: RealImages, name: str, cache_dir: Path, device: torch.device) -> metrics.FrechetStatistics:
    """Compute mean and covariance of real images' features, or read them from the cache, in one process."""
    file = cache_dir / "statistics" / f"{real.fingerprints[name]}.safetensors"
    kept = read_tensors(file)
    if kept is None or set(kept) != {"mean", "factor"}:
        made = metrics.frechet_statistics(real.features[name].to(device))
        kept = {"mean": made.mean.cpu(), "factor": made.factor.cpu()}
        write_tensors(file, kept)
    return metrics.FrechetStatistics(kept["mean"].to(device), kept["factor"].to(device), len(real.features[name]))


def _labels_of_samples(classes: Any, options: EvaluationOptions, train: Any) -> tuple[list[Any] | None, str | None]:
    """Return the class label of each sample, and how it is chosen, in words."""
    ids = range(options.num_samples)
    if classes.count is None:
        return None, None
    if train is not None and train.labels is not None and len(train.labels):
        index_of = classes.of_names(train.class_names)
        generators = (derived_generator(options.seed, "class", i) for i in ids)
        drawn = (int(torch.randint(len(train.labels), (), generator=g)) for g in generators)
        return [index_of[int(train.labels[j])] for j in drawn], "drawn with the frequencies of the training images"
    if classes.null is not None:
        return [None for _ in ids], "none: the label that stands for no class"
    return [ClassIndex(i % classes.count) for i in ids], f"in turn, 0..{classes.count - 1}"


@torch.no_grad()
def draw_samples(
    pipe: DDPMPipeline, extractors: list[FeatureExtractor], options: EvaluationOptions, train: Any = None
) -> Samples:
    """Draw samples and keep their features, of the floats that the sampler gives and of whole pixel values.

    A class-conditional network is sampled with the class frequencies of the `train` images. Raises a UserError for a
    count or number of steps out of range, or classes that the network does not know.
    """
    count, seed, steps = options.num_samples, options.seed, checked_steps(pipe.scheduler, options.num_inference_steps)
    if count < 1:
        raise UserError(f"num_samples must be at least 1, got {count}")
    sampling: dict[str, Any] = {
        "sampler": type(pipe.scheduler).__name__,
        "num_inference_steps": steps,
        "eta": checked_eta(pipe.scheduler, options.eta),
        "guidance_scale": options.guidance_scale,
        "seed": seed,
        **describe_pipeline(pipe),
    }
    labels, rule = _labels_of_samples(pipe.classes, options, train)
    seen_labels = None
    if rule is not None:
        sampling["class_labels"] = rule
        seen_labels = None if train is None or train.labels is None else digest(train.labels, train.class_names)
    fingerprints = [extractor.fingerprint for extractor in extractors]
    key = digest(weights_digest(pipe.unet), pipe.settings, sampling, seen_labels, fingerprints)

    def rows_of(start: int, rows: list[int]) -> Rows:
        ids = [start + row for row in rows]
        with without_bar(pipe):
            (drawn,) = pipe(
                seeds=[seed + i for i in ids],
                class_labels=None if labels is None else [labels[i] for i in ids],
                num_inference_steps=options.num_inference_steps,
                eta=options.eta,
                guidance_scale=options.guidance_scale,
                output_type="pt",
                return_dict=False,
            )
        pixels = drawn.float() * 255
        both = {"uint8": pixels.round().to(torch.uint8), "float": pixels}
        found: Rows = {} if start else {"images": both["uint8"]}
        for extractor in extractors:
            for kind, images in both.items():
                if kind == "uint8" or extractor.takes_floats:
                    found |= {f"{extractor.name}/{kind}/{what}": values for what, values in extractor(images).items()}
        return found

    first, rest = (
        all_rows(
            max(0, stop - start),
            partial(rows_of, start),
            batch_size=options.batch_size,
            folder=None if options.work_dir is None else options.work_dir / "samples" / key[:16] / name,
            desc=f"sampling, {steps} steps",
            progress=options.progress,
        )
        for name, start, stop in (("first", 0, min(count, KEPT_SAMPLES)), ("rest", KEPT_SAMPLES, count))
    )
    images = first.pop("images")
    samples = Samples(count, images, {}, {}, {**sampling, "num_samples": count, "seeds": f"{seed}-{seed + count - 1}"})
    for row_name in sorted(first):
        extractor_name, kind, what = row_name.rsplit("/", 2)
        values = torch.cat([first[row_name], rest[row_name]]) if rest else first[row_name]
        (samples.features if what == "features" else samples.logits)[extractor_name, kind] = values
    return samples


def add_sample_metrics(report: EvaluationReport, measured: Iterable[Measured], samples: Samples) -> None:
    """Add the numbers of `sample_metrics` to the report, and what few samples do to them."""
    started, biases = time.monotonic(), {}
    for name, estimate, settings, more in measured:
        report.add(name, *estimate, {**settings, "seconds": round(time.monotonic() - started, 2)}, **more)
        if "estimated_bias" in more:
            biases[name] = more["estimated_bias"]
        started = time.monotonic()
    if not biases or samples.count >= PAPER_SAMPLES:
        return
    by = ", ".join(f"{name} by about {bias:.3g}" for name, bias in biases.items() if math.isfinite(bias))
    report.warnings.append(
        f"FID and other Frechet distances from {samples.count} samples are biased upwards (the paper takes "
        f"{PAPER_SAMPLES}){f': {by} (a jackknife estimate)' if by else ''}; compare them only with numbers from as "
        "many samples"
    )
    for name, size in {name: features.shape[1] for (name, _), features in samples.features.items()}.items():
        if samples.count <= size:
            few = f"{samples.count} samples are too few to know the covariance of {size} {name} features"
            report.warnings.append(f"{few}; take more than {size}")


def sample_metrics(
    wanted: list[str], samples: Samples, references: list[RealImages], cache_dir: Path, device: torch.device
) -> Iterator[Measured]:
    """Compute FID, IS, KID, precision and recall of samples against each set of real images.

    Names say what was compared: `fid_inception_train_float`, `kid_inception_validation_uint8`; with other features
    than Inception's FID is called `fd` and KID `kd`.
    """
    for (name, kind), features in samples.features.items():
        x, count, inception = features.to(device), samples.count, name == "inception"
        common = {"features": name, "sample_values": kind, "num_samples": count}
        if "is" in wanted and (name, kind) in samples.logits:
            score, deviation = metrics.inception_score(samples.logits[name, kind].to(device))
            how = {"estimator": f"{count} samples ({kind}), 10 parts", **common}
            yield f"is_{name}_{kind}", score, how, {"standard_deviation": deviation}
        # Once for all sets of real images: with 50,000 samples this is the long part.
        gaussians = [metrics.frechet_statistics(part) for part in metrics.leaving_out(x)] if "fid" in wanted else []
        for real in references:
            y, where = real.features[name], f"{name}_{real.split}_{kind}"
            words = f"{count} samples ({kind}) against {len(y)} images of {real.split}, {name} features"
            against = {"split": real.split, "num_real": len(y), "statistics": real.fingerprints[name]}
            how = {"estimator": words, **common, **against}
            if "fid" in wanted:
                reference = real_statistics(real, name, cache_dir, device)
                distance, bias = metrics.jackknife([metrics.frechet_distance(g, reference) for g in gaussians])
                yield ("fid_" if inception else "fd_") + where, distance, how, {"estimated_bias": bias}
            if kind == "float":  # the other numbers are defined for whole pixel values
                continue
            if "kid" in wanted:
                distance, size = metrics.kernel_distance(x, y.to(device))
                subsets = {"estimator": f"{words}, 100 subsets of {size}", "subset_size": size}
                yield ("kid_" if inception else "kd_") + where, distance, how | subsets, {}
            if "prc" in wanted:
                third = {"estimator": f"{words}, third neighbour", "neighbour": 3}
                precision, recall = metrics.precision_recall(x, y.to(device))
                yield f"precision_{where}", precision, how | third, {}
                yield f"recall_{where}", recall, how | third, {}
