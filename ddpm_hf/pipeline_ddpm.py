"""Sampling (Algorithm 2) as a diffusers pipeline that reads and writes stock repositories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (looked up here by name, see load_config)
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as StockDDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as StockDDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (looked up here by name, see load_config)
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_ddpm import DDPMScheduler
from .unet_2d import PortableConfigMixin, UNet2DModel

# What stock repositories name, and our class of the same name that opens it.
_OURS = {("diffusers", "UNet2DModel"), ("diffusers", "DDPMScheduler")}


class DDPMPipeline(PortableConfigMixin, StockDDPMPipeline):
    """Samples images from a DDPM (Algorithm 2).

    Repositories written by `save_pretrained` are stock's: library `diffusers`, the same files and keys.
    `from_pretrained` opens stock repositories with this package's network and scheduler. Other schedulers (DDIM,
    DPM-Solver, ...) work as in stock: `DDPMPipeline(unet, DDIMScheduler.from_config(pipe.scheduler.config))`.

    Args:
        unet: The network; its `sample_size` and `in_channels` give the shape of the images.
        scheduler: A `DDPMScheduler` (stock's becomes this package's), or another diffusers scheduler.
    """

    unet: UNet2DModel
    scheduler: Any

    def __init__(self, unet: UNet2DModel, scheduler: Any):
        if type(scheduler) is StockDDPMScheduler:
            scheduler = DDPMScheduler.from_config(scheduler.config)
        super().__init__(unet=unet, scheduler=scheduler)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's configuration, with stock's class names pointed at this package's classes of the same name.

        diffusers looks up a component's class, and the base classes that say how to load it, as attributes of the
        module named there; this module has both.
        """
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in list(config.items()):
            if isinstance(value, (list, tuple)) and tuple(value) in _OURS:
                config[name] = [__name__, value[1]]
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> DDPMPipeline:
        """As `diffusers.DiffusionPipeline.from_pretrained`, from safetensors only.

        Raises:
            ValueError: `use_safetensors=False` was asked for.
        """
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False would read a pickle; convert the repository to safetensors first")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return self.unet.config.in_channels, height, width

    def checked_steps(self, num_inference_steps: int | None) -> int:
        """The number of sampler steps: the chain's T for `None`.

        Raises:
            ValueError: Not between 1 and T.
        """
        T = self.scheduler.config.num_train_timesteps
        if num_inference_steps is None:
            return T
        if not 1 <= num_inference_steps <= T:
            raise ValueError(
                f"num_inference_steps must be between 1 and the {T} steps of the chain, got {num_inference_steps}"
            )
        return num_inference_steps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        seeds: Iterable[int] | None = None,
        class_labels: int | Iterable[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        The network runs in evaluation mode and in its own dtype; the chain stays in float32.

        Args:
            batch_size: How many images; 1 by default, or as many as there are seeds.
            generator: One generator for all, or one per image; draws as in stock.
            num_inference_steps: Steps of the chain; the scheduler's T by default (1000 in the paper).
            output_type: `pil`, `np` (`[B, H, W, C]` in [0, 1]) or `pt` (`[B, C, H, W]` in [0, 1]).
            return_dict: `False` gives a tuple.
            seeds: One seed per image, instead of `generator`: image i depends on its own seed only.
            class_labels: For class-conditional networks: one class for all images, or one per image.
            guidance_scale: Classifier-free guidance (Ho & Salimans 2022): 1 samples the class as it was learned,
                more exaggerates it, at two network evaluations per step. Needs a network trained with class dropout.

        Returns:
            `.images`.

        Raises:
            ValueError: An argument is outside its range, or `seeds` is given with `generator`, or counts disagree.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if seeds is not None:
            if generator is not None:
                raise ValueError("pass either seeds or generator, and not both")
            seeds = list(seeds)
            if batch_size not in (None, len(seeds)):
                raise ValueError(f"batch_size={batch_size} but {len(seeds)} seeds; leave batch_size out")
            batch_size = len(seeds)
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        batch_size = 1 if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"got {len(generator)} generators for batch_size={batch_size}; pass one per image")
        num_inference_steps = self.checked_steps(num_inference_steps)

        labels = self._checked_labels(class_labels, guidance_scale, batch_size)
        device = self._execution_device
        image = randn_tensor((batch_size, *self.image_shape), generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        with evaluating(self.unet):
            for t in self.progress_bar(self.scheduler.timesteps):
                model_output = self._predict(image.to(self.unet.dtype), t.to(device), labels, guidance_scale)
                image = self._step(model_output.float(), t, image, generator)
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class" in a network trained with class dropout, else `None`."""
        return self.unet.config.get("_null_class")

    def _checked_labels(self, class_labels: Any, guidance_scale: float, batch_size: int) -> torch.Tensor | None:
        """`[B]` class indices on the device, or `None` for an unconditional network."""
        classes = self.unet.config.num_class_embeds
        if classes is None:
            if class_labels is not None or guidance_scale != 1:
                raise ValueError("class_labels and guidance_scale are for class-conditional networks; this one is not")
            return None
        if guidance_scale != 1 and self.null_class is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a network trained with class dropout, and this one was not"
            )
        if class_labels is None:
            if self.null_class is None:
                raise ValueError(f"this network is class-conditional: give class_labels, 0..{classes - 1}")
            class_labels = self.null_class
        labels = torch.as_tensor(
            class_labels if isinstance(class_labels, (int, torch.Tensor)) else list(class_labels)
        ).long()
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if labels.shape != (batch_size,):
            raise ValueError(f"got {labels.numel()} class_labels for {batch_size} images; give one, or one per image")
        if labels.min() < 0 or labels.max() >= classes:
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise ValueError(f"class label {wrong} is outside 0..{classes - 1}")
        return labels.to(self._execution_device)

    def _predict(
        self, image: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        """The network's output, guided away from "no class" where a guidance scale asks for it."""
        if labels is None or guidance_scale == 1:
            return self.unet(image, t, class_labels=labels).sample
        nothing = torch.full_like(labels, self.unet.config["_null_class"])
        both = self.unet(torch.cat([image, image]), t, class_labels=torch.cat([labels, nothing])).sample
        with_class, without = both.chunk(2)
        guided = without + guidance_scale * (with_class - without)
        channels = image.shape[1]  # a learned variance is not guided
        return torch.cat([guided[:, :channels], with_class[:, channels:]], dim=1)

    def _step(self, model_output: torch.Tensor, t: torch.Tensor, image: torch.Tensor, generator: Any) -> torch.Tensor:
        """One scheduler step; deterministic schedulers such as DPM-Solver in stock take no generator."""
        if not isinstance(self.scheduler, DDPMScheduler):
            model_output = model_output[:, : image.shape[1]]  # a learned variance is for the ancestral sampler only
        try:
            return self.scheduler.step(model_output, t, image, generator=generator).prev_sample
        except TypeError as error:
            if "generator" not in str(error):
                raise
            return self.scheduler.step(model_output, t, image).prev_sample


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode (no dropout) inside, and as it was afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
