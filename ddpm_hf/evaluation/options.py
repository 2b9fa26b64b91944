"""What `evaluate` measures and how: the metrics by name, and its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import default_cache_dir
from ..utils.text import nearest

LIKELIHOOD_METRICS = ("nll", "rate_distortion")
SAMPLE_METRICS = ("fid", "is", "kid", "prc", "nn")
METRICS = LIKELIHOOD_METRICS + SAMPLE_METRICS


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated; `batch_size` changes no number. See `generation.with_sampler` and `DDPMPipeline`."""

    # the likelihood
    likelihood_splits: Sequence[str] | None = None  # the first has the plain names; by default those held out
    num_images: int | None = None  # the first this many of each split; all for `None`
    num_evaluations: int | None = None  # of the network per image, for a stratified estimate; all T for `None`
    # samples
    num_samples: int = 50_000
    sampler: str = "ddpm"
    variance_type: str | None = None
    timestep_spacing: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float = 1.0
    features: Sequence[str] = ("inception",)  # what images are compared by, see `features.make_extractor`
    inception_weights: str | Path | None = None
    # both
    seed: int = 0  # of the likelihood's noise; sample i has the seed `seed + i`
    batch_size: int = 256
    cache_dir: Path = field(default_factory=default_cache_dir)  # for features of real images
    work_dir: Path | None = None  # finished batches, to resume from; `evaluate` sets it
    output: Path | None = None  # a folder for `report.json`, `report.md`, pictures and `work/`
    model_name: str | None = None
    progress: bool = False


def parse_metrics(text: str, known: Sequence[str] = METRICS, flag: str = "--metrics") -> list[str]:
    """Read `"nll,fid"` as `["nll", "fid"]`; raises a UserError for none, or one that is not among `known`."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            hint = f"; {name} is for finished models: ddpm-hf evaluate" if name in METRICS else nearest(name, known)
            raise UserError(f"{flag} knows {', '.join(known)}, got {name!r}{hint}")
    if not names:
        raise UserError(f"{flag} names no metric; it knows {', '.join(known)}")
    return list(dict.fromkeys(names))
