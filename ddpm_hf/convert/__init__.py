"""Other implementations' checkpoints as our models."""

from .conversion import convert, load_pipeline

__all__ = ["convert", "load_pipeline"]
