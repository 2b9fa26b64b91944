"""Images and models to numbers: likelihoods, distances of samples, reports."""

from .run import evaluate

__all__ = ["evaluate"]
