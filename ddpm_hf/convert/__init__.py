"""Other people's checkpoints as our models."""

from .formats import ConversionError, convert, convert_to_official, load_foreign

__all__ = ["ConversionError", "convert", "convert_to_official", "load_foreign"]
