"""How a model is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..sampling.generation import SamplingOptions
from ..utils.files import default_cache_dir


@dataclass(frozen=True)
class EvaluationOptions(SamplingOptions):
    """How a model is sampled and evaluated; `batch_size` changes no number."""

    # the likelihood
    likelihood_splits: Sequence[str] | None = None  # the first has the plain names; by default those held out
    num_images: int | None = None  # the first this many of each split; all for `None`
    num_evaluations: int | None = None  # of the network per image, for a stratified estimate; all T for `None`
    likelihood_steps: int | None = None  # nll is the bound of the chain of so many steps; of all T for `None`
    # samples
    num_samples: int = 50_000
    num_sets: int = 1  # of so many samples, each with seeds of its own
    features: Sequence[str] | str = "inception"  # what images are compared by, see `features.make_extractor`; "a,b"
    inception_weights: str | Path | None = None
    # both
    seed: int = 0  # of the likelihood's noise; sample i has the seed `seed + i`
    batch_size: int = 256
    cache_dir: Path = field(default_factory=default_cache_dir)  # for features of real images
    work_dir: Path | None = None  # finished batches, to resume from; `evaluate` sets it
    output: Path | None = None  # a folder for `report.json`, `report.md`, pictures and `work/`
    model_name: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("cache_dir", "work_dir", "output"):  # which may be texts
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(folder))
