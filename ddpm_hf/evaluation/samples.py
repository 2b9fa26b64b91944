"""Samples of a model beside real images: their features, then FID, IS, KID, precision and recall.

Features are computed batch by batch, in any number of processes; every finished batch is on disk, so an interrupted
evaluation resumes. Only the first samples are kept as images. A new metric is a function and a `SAMPLE_METRICS` entry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..pipelines.pipeline_ddpm import DDPMPipeline, without_bar
from ..sampling.shards import Rows, all_rows
from ..utils.digests import digest, images_digest, weights_digest
from ..utils.processes import from_first, processes, raise_on_all_ranks
from ..utils.progress import in_parts, progress_bar
from ..utils.randomness import derived_generator
from . import distances, further_metrics, metrics
from .features import FeatureExtractor, Pixels
from .options import EvaluationOptions
from .report import EvaluationReport, describe_pipeline

PAPER_SAMPLES = 50_000  # what the paper's FID and IS are computed from
KEPT_SAMPLES = 1000  # so many are kept as images, for pictures and for neighbours among the training images


@dataclass
class RealImages:
    """Real images of a split and their features, by the name of what computed them."""

    split: str  # train, validation, ...
    images: Any  # an image dataset with `len` and `batch`, not a stream
    features: dict[str, Tensor] = field(default_factory=dict)  # [N, D] float32
    fingerprints: dict[str, str] = field(default_factory=dict)  # hashes of images, preprocessing and weights
    _compared: dict[str, Features] = field(default_factory=dict)

    def compared(self, name: str, device: Any) -> Features:
        """Return features on a device; what metrics find out about them is kept for the next set of samples."""
        if name not in self._compared:
            self._compared[name] = Features(self.features[name].to(device))
        return self._compared[name]


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
        key = real.fingerprints[extractor.name] = digest(content, extractor.fingerprint)
        real.features[extractor.name] = _features(real, extractor, options, options.cache_dir / "features" / key)
    return real


def _features(real: RealImages, extractor: FeatureExtractor, options: EvaluationOptions, folder: Path) -> Tensor:
    """Return features of real images, `[N, D]`; pixels are made sooner than read from a disk."""
    count, desc = len(real.images), f"{extractor.name} features, {real.split}"

    def rows(ids: Tensor) -> Tensor:
        return extractor(real.images.batch(ids)[0])["features"]

    if not isinstance(extractor, Pixels):

        def make(ids: list[int]) -> Rows:
            return {"features": rows(torch.tensor(ids))}

        return all_rows(count, make, options.batch_size, folder, desc, options.progress)["features"]
    features = torch.empty((count, extractor.size))
    for ids in in_parts(torch.arange(count).split(options.batch_size), desc):
        features[ids] = rows(ids)
    return features


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
        return [None] * len(ids), "none: the label that stands for no class"
    return [ClassIndex(i % classes.count) for i in ids], f"in turn, 0..{classes.count - 1}"


@torch.no_grad()
def draw_samples(
    pipe: DDPMPipeline, extractors: list[FeatureExtractor], options: EvaluationOptions, train: Any = None
) -> Samples:
    """Draw samples and keep their features, of the floats that the sampler gives and of whole pixel values.

    A class-conditional network is sampled with the class frequencies of the `train` images. Raises a UserError for a
    count or number of steps out of range, or classes that the network does not know.
    """
    count, seed = options.num_samples, options.seed
    sampling: dict[str, Any] = {"sampler": type(pipe.scheduler).__name__, **options.recorded(pipe), "seed": seed}
    sampling |= describe_pipeline(pipe)
    labels, rule = _labels_of_samples(pipe.classes, options, train)
    seen_labels = None
    if rule is not None:
        sampling["class_labels"] = rule
        seen_labels = None if train is None or train.labels is None else digest(train.labels, train.class_names)
    fingerprints = [(extractor.name, extractor.fingerprint) for extractor in extractors]
    key = digest(weights_digest(pipe.unet), pipe.settings, sampling, seen_labels, fingerprints)

    def rows_of(start: int, rows: list[int]) -> Rows:
        ids = [start + row for row in rows]
        shown = options.progress and processes().is_main_process
        with without_bar(pipe), progress_bar(len(ids), "this batch", show=shown, delay=2) as bar:

            def advance(*_: Any) -> None:
                bar.update(len(ids) / len(pipe.scheduler.timesteps))  # of some samplers more than `steps`

            own: dict[str, Any] = {"class_labels": None if labels is None else [labels[i] for i in ids]}
            own |= {"callback_on_step_end": advance, **options.chain}
            drawn: Any = pipe(seeds=[seed + i for i in ids], output_type="pt", **own)
        pixels = drawn.images.float() * 255
        both = {"uint8": pixels.round().to(torch.uint8), "float": pixels}
        found: Rows = {} if start else {"images": both["uint8"]}
        for extractor in extractors:
            for kind, images in both.items():
                if kind == "uint8" or extractor.takes_floats:
                    found |= {f"{extractor.name}/{kind}/{what}": values for what, values in extractor(images).items()}
        return found

    def part(name: str, start: int, stop: int) -> Rows:
        folder = None if options.work_dir is None else options.work_dir / "samples" / key[:16] / name
        rows, desc = max(0, stop - start), f"sampling, {sampling['num_inference_steps']} steps"
        return all_rows(rows, partial(rows_of, start), options.batch_size, folder, desc, options.progress)

    first, rest = part("first", 0, min(count, KEPT_SAMPLES)), part("rest", KEPT_SAMPLES, count)
    images = first.pop("images")
    numbers = {"num_samples": count, "seeds": f"{seed}-{seed + count - 1}"}
    numbers["network_evaluations"] = pipe.network_evaluations(**options.chain)
    samples = Samples(count, images, {}, {}, sampling | numbers)
    for row_name in sorted(first):
        extractor_name, kind, what = row_name.rsplit("/", 2)
        values = torch.cat([first[row_name], rest[row_name]]) if rest else first[row_name]
        (samples.features if what == "features" else samples.logits)[extractor_name, kind] = values
    return samples


@dataclass
class Features:
    """What a metric compares: features of samples or of real images, and the Gaussians that are fitted to them."""

    values: Tensor  # [N, D]
    logits: Tensor | None = None  # [N, classes], of a classifier

    @cached_property
    def gaussian(self) -> metrics.FrechetStatistics:
        return metrics.frechet_statistics(self.values)

    @cached_property
    def _neighbours(self) -> Tensor:  # [N, <= 5], which several metrics need
        return distances.nearest_others(self.values, min(5, len(self.values) - 1))

    def radii(self, k: int) -> Tensor:
        """Return the squared distances to the k-th nearest other ones, `[N]`; k <= 5."""
        return self._neighbours[:, k - 1]

    @cached_property
    def gaussians(self) -> list[metrics.FrechetStatistics]:  # of all, and without each tenth: slow with 50,000 samples
        return [metrics.frechet_statistics(part) for part in metrics.leaving_out(self.values)]


# Numbers: the first part of the name, the estimate, how it was made (with words), and what else is known of it.
Found = list[tuple[str, metrics.Estimate, dict[str, Any], dict[str, float]]]


def _fid(samples: Features, real: Features) -> Found:
    distance, bias = metrics.jackknife([metrics.frechet_distance(g, real.gaussian) for g in samples.gaussians])
    return [("fid", distance, {}, {"estimated_bias": bias})]


def _inception_score(samples: Features, real: Features) -> Found:
    if samples.logits is None:
        return []
    score, deviation = metrics.inception_score(samples.logits)
    return [("is", score, {"estimator": "10 parts"}, {"standard_deviation": deviation})]


def _kid(samples: Features, real: Features) -> Found:
    distance, size = metrics.kernel_distance(samples.values, real.values)
    return [("kid", distance, {"estimator": f"100 subsets of {size}", "subset_size": size}, {})]


def _precision_recall(samples: Features, real: Features) -> Found:
    radii = (samples.radii(3), real.radii(3))
    both = zip(("precision", "recall"), metrics.precision_recall(samples.values, real.values, 3, radii), strict=True)
    return [(what, share, {"estimator": "third neighbour", "neighbour": 3}, {}) for what, share in both]


def _density_coverage(samples: Features, real: Features) -> Found:
    numbers = further_metrics.density_coverage(samples.values, real.values, 5, real.radii(5))
    both = zip(("density", "coverage"), numbers, strict=True)
    return [(what, number, {"estimator": "fifth neighbour", "neighbour": 5}, {}) for what, number in both]


def _authentic(samples: Features, real: Features) -> Found:
    share = further_metrics.authentic_share(samples.values, real.values, real.radii(1))
    return [("authentic", share, {"estimator": "first neighbour"}, {})]


def _number(what: str, compute: Callable[[Tensor, Tensor], metrics.Estimate], how: str) -> SampleMetric:
    def found(samples: Features, real: Features) -> Found:
        return [(what, compute(samples.values, real.values), {"estimator": how}, {})]

    return SampleMetric(found, (what,), 20)


class SampleMetric(NamedTuple):
    """A metric of samples: a function, and what its numbers are (see `number_name`)."""

    compute: Callable[[Features, Features], Found]  # of samples and of real images
    numbers: tuple[str, ...]
    at_least: int  # so many samples and real images
    kinds: tuple[str, ...] = ("uint8",)  # `float` where it is defined for samples that are not rounded
    of_real: bool = True  # whether samples are compared with real images
    higher_is_better: bool = False


SAMPLE_METRICS = {
    "fid": SampleMetric(_fid, ("fid",), 2, ("uint8", "float")),
    "is": SampleMetric(_inception_score, ("is",), 10, ("uint8", "float"), of_real=False, higher_is_better=True),
    "kid": SampleMetric(_kid, ("kid",), 4),
    "prc": SampleMetric(_precision_recall, ("precision", "recall"), 4, higher_is_better=True),
    "dc": SampleMetric(_density_coverage, ("density", "coverage"), 6, higher_is_better=True),
    "fd_infinity": _number(
        "fid_infinity", further_metrics.frechet_distance_infinity, "a line in 1/N through 15 sizes"
    ),
    "mmd": _number("mmd", further_metrics.gaussian_kernel_distance, "Gaussian kernel, sigma 10, times 1000"),
    "sw": _number("sw", further_metrics.sliced_wasserstein, "1024 directions, times the number of features"),
    "auth": SampleMetric(_authentic, ("authentic",), 20, higher_is_better=True),
    "nn": SampleMetric(lambda *_: [], (), 1),  # of images rather than features: `neighbours`
}


# What a number is called where the features are not Inception's: only there it is the published one.
_OTHER_NAMES = {"fid": "fd", "kid": "kd", "fid_infinity": "fd_infinity"}


def number_name(what: str, features: str, split: str | None, kind: str) -> str:
    """Return what a number is called, such as `fid_inception_train_float`; of other features FID is `fd`, KID `kd`."""
    what = what if features == "inception" else _OTHER_NAMES.get(what, what)
    return "_".join(filter(None, (what, features, split, kind)))


def higher_is_better(name: str) -> bool | None:
    """Return whether the larger one of two numbers of this name is the better one; `None` if neither is."""
    if name.startswith("bits_per_dim"):
        return False
    for metric in SAMPLE_METRICS.values():
        if name.startswith(tuple(f"{n}_" for what in metric.numbers for n in (what, _OTHER_NAMES.get(what, what)))):
            return metric.higher_is_better
    return None


def add_sample_metrics(
    report: EvaluationReport, wanted: Iterable[str], samples: Samples, references: list[RealImages], device: Any
) -> None:
    """Add the numbers of samples against each set of real images to a report, and what few samples do to them."""
    started, biases, count = time.monotonic(), [], samples.count
    for (name, kind), values in samples.features.items():
        logits = samples.logits.get((name, kind))
        features = Features(values.to(device), None if logits is None else logits.to(device))
        chosen = [metric for name, metric in SAMPLE_METRICS.items() if name in wanted and kind in metric.kinds]
        for metric, real in ((m, real) for m in chosen for real in (references if m.of_real else references[:1])):
            words = f"{count} samples ({kind}) of {samples.settings['network_evaluations']} network evaluations each"
            how = {"features": name, "sample_values": kind, "num_samples": count}
            if metric.of_real:
                words += f", against {len(real.images)} images of {real.split}, {name} features"
                how |= {"split": real.split, "num_real": len(real.images), "statistics": real.fingerprints[name]}
            for what, estimate, settings, more in metric.compute(features, real.compared(name, device)):
                estimator = ", ".join(filter(None, (words, settings.get("estimator"))))
                seconds = round(time.monotonic() - started, 2)
                number = number_name(what, name, real.split if metric.of_real else None, kind)
                report.add(number, *estimate, how | settings | {"estimator": estimator, "seconds": seconds}, **more)
                if math.isfinite(bias := more.get("estimated_bias", math.nan)):
                    biases.append(f"{number} by about {bias:.3g}")
                started = time.monotonic()
    if "fid" not in wanted or samples.count >= PAPER_SAMPLES:
        return
    by = f": {', '.join(biases)} (a jackknife estimate)" if biases else ""
    report.warnings.append(
        f"FID and other Frechet distances from {samples.count} samples are biased upwards (the paper takes "
        f"{PAPER_SAMPLES}){by}; compare them only with numbers from as many samples"
    )
    for name, size in {name: features.shape[1] for (name, _), features in samples.features.items()}.items():
        if samples.count <= size:
            few = f"{samples.count} samples are too few to know the covariance of {size} {name} features"
            report.warnings.append(f"{few}; take more than {size}")
