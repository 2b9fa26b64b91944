"""The DDPM of Ho, Jain and Abbeel (2020), exact to the paper, inside the Hugging Face ecosystem.

Names are imported when they are first used, so `import ddpm_hf` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "DDPMPipeline": "pipeline_ddpm",
    "DDPMScheduler": "scheduling_ddpm",
    "EvaluationReport": "evaluation",
    "LikelihoodEstimate": "likelihood",
    "LikelihoodResult": "likelihood",
    "PRESETS": "presets",
    "Trainer": "training",
    "TrainingConfig": "configuration",
    "UNet2DModel": "unet_2d",
    "bits_per_dim": "likelihood",
    "get_preset": "presets",
    "stratified_bits_per_dim": "likelihood",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors
    from .configuration import TrainingConfig
    from .evaluation import EvaluationReport
    from .likelihood import LikelihoodEstimate, LikelihoodResult, bits_per_dim, stratified_bits_per_dim
    from .pipeline_ddpm import DDPMPipeline
    from .presets import PRESETS, get_preset
    from .scheduling_ddpm import DDPMScheduler
    from .training import Trainer
    from .unet_2d import UNet2DModel


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
