"""Images and models to numbers: likelihoods, distances of samples, reports."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `evaluate` when it is used: reports are read without PyTorch, which takes seconds."""
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import evaluate

    return evaluate
