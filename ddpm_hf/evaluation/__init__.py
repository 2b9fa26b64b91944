"""Images and models to numbers: likelihoods, distances of samples, reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import `evaluate` when it is first used: `evaluation.report`, which a push reads, needs no torch."""
    if name == "evaluate":
        from .run import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
