"""Images and models to numbers: likelihoods, distances of samples, reports."""

from .options import EvaluationOptions
from .run import evaluate

__all__ = ["EvaluationOptions", "evaluate"]
