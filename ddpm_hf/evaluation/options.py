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
    """How a model is evaluated.

    Attributes:
        likelihood_splits: Splits whose likelihood is computed, the first with plain names; held-out ones by default.
        num_images: For the likelihood, the first this many images of each split; `None` for all.
        num_evaluations: Network evaluations per image for a stratified estimate of the likelihood; `None` for all T.
        num_samples: Images to draw; 50,000 in the paper.
        batch_size: Images at a time; changes no number.
        sampler, variance_type, timestep_spacing: See `generation.with_sampler`; for samples only.
        num_inference_steps, eta, guidance_scale: See `DDPMPipeline`; for samples only.
        seed: Seed of the likelihood's noise; sample i has the seed `seed + i`.
        features: What images are compared by, see `features.make_extractor`.
        inception_weights: See `features.Inception`.
        cache_dir: Where features of real images are kept.
        work_dir: Where finished batches are kept to resume from; `None` for nowhere, or as `evaluate` chooses.
        output: A folder for `report.json`, `report.md`, pictures and `work/`.
        model_name: The model's name in the report.
        progress: Show progress bars.
    """

    likelihood_splits: Sequence[str] | None = None
    num_images: int | None = None
    num_evaluations: int | None = None
    num_samples: int = 50_000
    batch_size: int = 256
    sampler: str = "ddpm"
    variance_type: str | None = None
    timestep_spacing: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    features: Sequence[str] = ("inception",)
    inception_weights: str | Path | None = None
    cache_dir: Path = field(default_factory=default_cache_dir)
    work_dir: Path | None = None
    output: Path | None = None
    model_name: str | None = None
    progress: bool = False


def parse_metrics(text: str, known: Sequence[str] = METRICS, flag: str = "--metrics") -> list[str]:
    """Read `"nll,fid"` as `["nll", "fid"]`.

    Raises:
        UserError: It names no metric, or one that is not among `known`.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            hint = f"; {name} is for finished models: ddpm-hf evaluate" if name in METRICS else nearest(name, known)
            raise UserError(f"{flag} knows {', '.join(known)}, got {name!r}{hint}")
    if not names:
        raise UserError(f"{flag} names no metric; it knows {', '.join(known)}")
    return list(dict.fromkeys(names))
