"""How a model is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.files import default_cache_dir


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated; `batch_size` changes no number. See `generation.with_sampler` and `DDPMPipeline`."""

    # the likelihood
    likelihood_splits: Sequence[str] | None = None  # the first has the plain names; by default those held out
    num_images: int | None = None  # the first this many of each split; all for `None`
    num_evaluations: int | None = None  # of the network per image, for a stratified estimate; all T for `None`
    likelihood_steps: int | None = None  # nll is the bound of the chain of so many steps; of all T for `None`
    # samples
    num_samples: int = 50_000
    sampler: str | None = None
    variance_type: str | None = None
    timestep_spacing: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] | None = None
    epsilon_scale: float | Sequence[float] | None = None
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

    @property
    def chain(self) -> dict[str, Any]:
        """What a call of `DDPMPipeline` takes of them."""
        names = ("num_inference_steps", "eta", "guidance_scale", "guidance_interval", "epsilon_scale")
        return {name: getattr(self, name) for name in names}
