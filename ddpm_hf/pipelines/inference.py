"""Let a pipeline compute its network faster."""

from ..models.inference import PRECISIONS, InferenceNetwork, InferenceOptions
from .pipeline_ddpm import DDPMPipeline

__all__ = ["InferenceOptions", "optimize_for_inference"]


def optimize_for_inference(
    pipe: DDPMPipeline, *, precision: str | None = None, compile: bool = False, options: InferenceOptions | None = None
) -> InferenceOptions:
    """Compute a pipeline's network in the way that is fast on its device: `pipe.network` afterwards.

    In fp32 images differ from the plain network's by rounding only. `pipe.network = pipe.unet` goes back.

    Args:
        pipe: The pipeline; its `unet` stays as it is.
        precision: `fp32`, `bf16` or `fp16`; that of the weights by default. Another one raises a UserError.
        compile: `torch.compile` as well, which takes up to minutes, and a C++ compiler on CPUs.
        options: These, instead of what is chosen for the device. What is in force is returned.
    """
    if options is None:
        own = {dtype: name for name, dtype in PRECISIONS.items()}.get(pipe.unet.dtype, "fp32")
        options = InferenceOptions.for_device(pipe.unet.device, precision or own, compile)
    for one in filter(None, (pipe, pipe.guide)):
        one.network = InferenceNetwork(one.unet, options)
    return options
