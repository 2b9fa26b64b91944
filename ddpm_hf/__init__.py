"""The DDPM of Ho, Jain and Abbeel (2020), exact to the paper, inside the Hugging Face ecosystem.

Names are imported when they are first used, so `import ddpm_hf` costs next to nothing.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_WHERE = {
    "DDPMPipeline": "pipelines.pipeline_ddpm",
    "DDPMScheduler": "diffusion.scheduling_ddpm",
    "EvaluationReport": "evaluation.report",
    "LikelihoodEstimate": "diffusion.likelihood",
    "LikelihoodResult": "diffusion.likelihood",
    "PRESETS": "presets",
    "Trainer": "training.trainer",
    "TrainingConfig": "training.configuration",
    "UNet2DModel": "models.unet_2d",
    "bits_per_dim": "diffusion.likelihood",
    "get_preset": "presets",
    "stratified_bits_per_dim": "diffusion.likelihood",
}

# Import paths of 0.1.0 that the documentation names: `import ddpm_hf.likelihood` still works.
_MOVED_TO = (
    "diffusion.likelihood diffusion.objectives diffusion.scheduling_ddpm models.unet_2d pipelines.figures "
    "pipelines.inference pipelines.pipeline_ddpm sampling.generation utils.visualize"
)
_MOVED = {path.rpartition(".")[2]: path for path in _MOVED_TO.split()}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors
    from .diffusion.likelihood import LikelihoodEstimate, LikelihoodResult, bits_per_dim, stratified_bits_per_dim
    from .diffusion.scheduling_ddpm import DDPMScheduler
    from .evaluation.report import EvaluationReport
    from .models.unet_2d import UNet2DModel
    from .pipelines.pipeline_ddpm import DDPMPipeline
    from .presets import PRESETS, get_preset
    from .training.configuration import TrainingConfig
    from .training.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    if name in _MOVED:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _MovedModules:
    """Import a module of `_MOVED` by its old path: the same module object, under both names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        new = _MOVED.get(name.removeprefix(f"{__name__}."))
        # A loader by what it does: importing `importlib.abc`, its base class, takes 10 ms.
        return ModuleSpec(name, self, origin=new) if new else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f".{spec.origin}", __name__)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has replaced its own


sys.meta_path.append(_MovedModules())
