"""Images and models to numbers: likelihoods, distances of samples, reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import `evaluate` when it is used: reports are read without PyTorch, which takes seconds."""
    if name == "evaluate":
        from .run import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
