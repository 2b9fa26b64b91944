"""Sampling (Algorithm 2) as a diffusers pipeline that reads and writes stock repositories."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (looked up here by name, see load_config)
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as StockDDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as StockDDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (looked up here by name, see load_config)
from diffusers.utils import logging
from torch import Tensor

from ..data.class_labels import Classes, ClassLabels
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet_2d import PortableConfigMixin, UNet2DModel, check_size, check_weights
from ..utils.errors import NotFiniteError, UserError, first_line
from ..utils.hub_errors import INDEX, PrivateByDefault, check_pipeline, retried
from ..utils.processes import log
from ..utils.randomness import NOISE_OF_SEEDS, Generators, standard_normal
from ..utils.text import is_local
from .adjustment import Adjustment, check_guide
from .checkpoints import newer_checkpoint, read_checkpoint
from .denoising import Denoiser, DenoisingStep, check_repaint, repaint
from .inputs import count_and_generators, images_in_model_range, mask_of, one_per_image
from .schedulers import BEST, DISTILLED_STEPS, check_is_ddpm, checked_eta, checked_steps, set_timesteps

# Arguments of from_pretrained that say where on the Hub, or how to read it: a checkpoint has no use for them.
_OF_REPOSITORIES = {"cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage", "proxies", "revision"}
_OF_REPOSITORIES |= {"token", "use_safetensors"}

# A trained model inside the package: what `make demo` makes.
INCLUDED_MODELS = {"digits": Path(__file__).parents[1] / "models" / "digits"}


def name_on_hub(model: str) -> str | None:
    """Return a model's name, if it is one of the Hub; `None` for a path and for a model inside the package."""
    return None if is_local(model) or model in INCLUDED_MODELS else model


# What stock repositories name, and our class of the same name that opens it.
_OURS = {("diffusers", "UNet2DModel"), ("diffusers", "DDPMScheduler")}


class DDPMPipeline(PortableConfigMixin, PrivateByDefault, StockDDPMPipeline):
    """Sample images from a DDPM (Algorithm 2); repositories are stock's, with the same files and keys.

    Args:
        unet: The network; its `sample_size` and `in_channels` give the shape of the images.
        scheduler: A `DDPMScheduler` (stock's becomes this package's), or another diffusers scheduler, as in stock:
            `DDIMScheduler.from_config(pipe.scheduler.config)`.
    """

    unet: UNet2DModel
    scheduler: Any
    _callback_tensor_inputs: ClassVar = ["image", "pred_original_sample"]
    _interrupt = False
    # A worse model of the same images, such as an earlier checkpoint or a smaller network, for autoguidance (Karras et
    # al. 2024): with `guidance_scale` w, a step takes D_guide + w (D - D_guide). Not saved with the pipeline.
    guide: DDPMPipeline | None = None

    def __init__(self, unet: UNet2DModel, scheduler: Any):
        super().__init__(unet=unet, scheduler=scheduler)
        self._network: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; stock's `DDPMScheduler` becomes this package's, later too (`pipe.scheduler = ...`)."""
        if name == "scheduler" and type(value) is StockDDPMScheduler:
            value = DDPMScheduler.from_config(value.config)
        super().__setattr__(name, value)

    @property
    def network(self) -> Any:
        """What evaluates the network: `unet`, or what `inference.optimize_for_inference` made of it."""
        made = self._network
        if made is None or made.unet is not self.unet or made.made_from != (self.unet.device, self.unet.dtype):
            return self.unet
        return made

    @network.setter
    def network(self, network: Any) -> None:
        self._network = None if network is self.unet else network

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the configuration, with stock's class names pointed at this package's classes of the same name.

        diffusers looks up components and their base classes as attributes of the module named there: of this one.
        """
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in list(config.items()):
            if isinstance(value, (list, tuple)) and tuple(value) in _OURS:
                config[name] = [__name__, value[1]]
        return loaded

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, weights: str = "ema", **kwargs: Any
    ) -> DDPMPipeline:
        """Load a model from safetensors: a folder, a repository on the Hub, a training run or one of its checkpoints.

        A folder with a `model_index.json` is loaded as stock does, also where a run has newer checkpoints in it. Of a
        run without one the newest complete checkpoint is taken; a line says which.

        Args:
            pretrained_model_name_or_path: The folder or the repository; what is in the cache needs no network. Where
                there is no folder `digits`, this is the trained model inside the package.
            weights: `ema`, or `raw` for those that a run's last update left, which only checkpoints hold.
            kwargs: Those of `diffusers.DiffusionPipeline.from_pretrained`: `dtype`, `revision`, `cache_dir`, ...

        Raises:
            OSError: It is not there, may not be read or is incomplete.
            UserError: It is no DDPM, a pickle, a damaged checkpoint, or has no such weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise UserError("use_safetensors=False would read a pickle; convert the repository to safetensors first")
        if weights not in ("ema", "raw"):
            raise UserError(f"weights must be 'ema' or 'raw', got {weights!r}")
        name, folder = pretrained_model_name_or_path, Path(pretrained_model_name_or_path)
        load = super().from_pretrained
        if not folder.exists() and (included := INCLUDED_MODELS.get(str(name))) is not None:
            name = folder = included
        if folder.is_dir() and (weights == "raw" or not (folder / INDEX).is_file()):
            return cls._from_checkpoint(folder, weights, **kwargs)
        if weights == "raw":
            raise UserError(f"{name!r} is no folder here, and raw weights are in the checkpoints of a run only")
        kwargs["use_safetensors"] = True  # for None, diffusers would fall back to pickles
        check_pipeline(name, **kwargs)
        pipe = retried(lambda: load(name, **kwargs), name)
        if folder.is_dir() and (newer := newer_checkpoint(folder)) is not None:
            log(f"the published model of {name}, which is older than {newer}; to replace it: ddpm-hf publish {name}")
        return pipe

    @classmethod
    def _from_checkpoint(cls, folder: Path, weights: str, **kwargs: Any) -> DDPMPipeline:
        """Return the model of a run's folder or of a checkpoint; see `from_pretrained`."""
        known = {"dtype", "torch_dtype", "unet", "scheduler"}
        options = {key: value for key, value in kwargs.items() if key not in _OF_REPOSITORIES and value is not None}
        if other := sorted(options.keys() - known):
            raise UserError(f"a checkpoint takes no {', '.join(other)}; make a pipeline of it first: ddpm-hf publish")
        checkpoint = read_checkpoint(folder, weights)
        unet, scheduler = checkpoint.model()
        log(str(checkpoint))
        if (dtype := options.get("dtype", options.get("torch_dtype"))) is not None:
            if not isinstance(dtype, torch.dtype):
                raise UserError(f"dtype of a checkpoint must be one such as torch.float16, got {dtype!r}")
            torch.nn.Module.to(unet, dtype)  # diffusers' own warns
        return cls(options.get("unet", unet), options.get("scheduler", scheduler))

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> DDPMPipeline:
        """Make this pipeline around the `unet` and `scheduler` of another one, which both then share.

        `kwargs` are `unet=` or `scheduler=` instead of its own, and `dtype=` (or `torch_dtype=`), which converts the
        shared network. Raises a UserError if the other one has more components.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        parts = {**pipeline.components, **kwargs}
        if extra := set(parts) - {"unet", "scheduler"}:
            raise UserError(f"a DDPM has a unet and a scheduler, and no {', '.join(sorted(extra))}")
        made = cls(**parts)
        return made if dtype is None else made.to(dtype)

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as stock does; `push_to_hub=True` also publishes the folder, with the arguments of `push_to_hub`."""
        options = {}
        if push_to_hub:
            _check_published_weights(safe_serialization, variant)
            names = ("repo_id", "commit_message", "private", "token", "create_pr")
            options = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            _push(save_directory, options.pop("repo_id", None) or Path(save_directory).resolve().name, **options)

    def _push_to_hub(self, repo_id: str, variant: str | None, options: dict[str, Any]) -> str:
        _check_published_weights(variant=variant)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return _push(folder, repo_id, **options)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides, beside the weights, which image a seed gives, as JSON values."""
        # without what diffusers notes for itself (`_use_default_values`, ...): it differs from process to process
        unet, scheduler = (
            {k: v for k, v in part.config.items() if not k.startswith("_") or k == "_prediction_error"}
            for part in (self.unet, self.scheduler)
        )
        if self.scheduler.config.get("_timestep_spacing") == BEST:
            scheduler |= {"timestep_spacing": BEST, "timesteps": self.scheduler.config.get("_timesteps")}
        dtype, sampler = str(self.network.dtype).removeprefix("torch."), type(self.scheduler).__name__
        return {"unet": unet, "dtype": dtype, "sampler": sampler, "noise": NOISE_OF_SEEDS, "scheduler": scheduler}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images; a UserError if `sample_size` is missing or cannot be halved."""
        size = self.unet.config.sample_size
        if size is None:
            raise UserError("the network's configuration has no sample_size; set it to the images' size")
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        check_size(self.unet, height, width)
        return self.unet.config.in_channels, height, width

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        seeds: Iterable[int] | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        epsilon_scale: float | tuple[float, float] | None = None,
        eta: float | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        resample_length: int = 10,
        resample_times: int = 10,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images; the network runs in evaluation mode and in its own dtype, the chain in float32.

        Args:
            batch_size: How many images; 1 by default, or as many as there are seeds or given images.
            generator: One generator for all, or one per image; draws as in stock.
            num_inference_steps: Steps of the chain; by default the scheduler's T (1000 in the paper), or what the
                model is distilled for.
            output_type: `pil`, or in [0, 1] `np` (`[B, H, W, C]`; also `numpy` or `None`) or `pt` (`[B, C, H, W]`).
            return_dict: `False` gives a tuple.
            seeds: One seed per image, instead of `generator`: image i depends on its own seed only, on every device.
                An empty list gives no images.
            class_labels: For class-conditional networks: one class for all images, or one per image, by name or
                number (`data.class_labels`); `None` is "no class".
            guidance_scale: Classifier-free guidance (Ho & Salimans 2022): 1 samples the class as it was learned,
                more exaggerates it, at two network evaluations per step. Needs a network trained with class dropout.
                With a `guide`, the weight of autoguidance instead: 0 is the guide, 1 the model, 2 as far again.
            guidance_interval: The timesteps `(low, high)` that are guided, both included; all by default.
            epsilon_scale: Epsilon scaling (Ning et al. 2024): b, or b and k; the predicted epsilon, whatever the
                network predicts it by, is divided by k t + b.
            eta: For DDIM: 0 is deterministic, 1 as random as the ancestral sampler. By default the scheduler's own.
            image: Start from this image instead of noise: a PIL image (scaled and cropped to fit), an array `[H, W,
                C]` or a tensor `[C, H, W]` in [0, 1], or a batch or list of them. Needs `strength` or `mask_image`.
            strength: With `image`: the share of the chain to go back; 0 keeps the image, 1 next to nothing of it.
            mask_image: With `image`: draw new pixels where it is white, keep the image where it is black (RePaint,
                Lugmayr et al. 2022). A PIL image, or an array or tensor `[H, W]` (or one per image).
            resample_length, resample_times: RePaint's j and r: each stretch of j steps is taken r times, so that the
                two parts fit together.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after every step; the "image"
                (x_{t-1}) that it returns replaces the chain's. `pipe._interrupt = True` ends the chain early.
            callback_on_step_end_tensor_inputs: What `tensors` holds: "image", "pred_original_sample".

        Returns:
            `.images`.

        Raises:
            UserError: An argument is outside its range, or does not go with another.
            NotFiniteError: The network made NaN or infinities, which are no pixel values.
        """
        output_type = "np" if output_type in ("numpy", None) else output_type
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if output_type == "pil" and self.image_shape[0] not in (1, 3):
            raise UserError(f"PIL has no images of {self.image_shape[0]} channels; use output_type='np' or 'pt'")
        inputs = callback_on_step_end_tensor_inputs
        if unknown := set(inputs) - set(self._callback_tensor_inputs):
            known = ", ".join(self._callback_tensor_inputs)
            raise UserError(f"callback_on_step_end_tensor_inputs knows {known}, got {min(unknown)!r}")
        num_inference_steps = self.checked_steps(num_inference_steps)
        given = None if image is None else images_in_model_range(image, self.image_shape)
        if seeds is None and batch_size is None and given is not None:
            batch_size = len(given)
        batch_size, source = count_and_generators(batch_size, generator, seeds, device := self._execution_device)
        set_timesteps(self.scheduler, num_inference_steps)
        start, mask = 0, None
        if given is not None:
            given = one_per_image(given, batch_size, "image").to(device)
            start = self._start_of(strength, mask_image is not None)
            if mask_image is not None:
                check_repaint(self.scheduler, resample_length, resample_times)
                mask = mask_of(mask_image, self.image_shape, batch_size).to(device)
        elif strength is not None or mask_image is not None:
            raise UserError("--strength and --mask_image go with an image; give --image")
        adjust = {"guidance_interval": guidance_interval, "epsilon_scale": epsilon_scale}
        denoiser = self._denoiser(source, batch_size, class_labels, guidance_scale, eta, **adjust)
        x_t = torch.empty(0, *self.image_shape)
        if batch_size:
            from_noise = mask is not None and start == 0
            x_t = self._noisy_start(source, batch_size, None if from_noise else given, start)
            steps, total = denoiser.steps(x_t, start), len(self.scheduler.timesteps) - start
            if given is not None and mask is not None:
                steps = repaint(denoiser, x_t, given, mask, start, resample_length, resample_times)
                total *= resample_times
            x_t = self._last_of(steps, x_t, total, callback_on_step_end, inputs)
        images = self.as_output(x_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _last_of(
        self, steps: Iterator[DenoisingStep], x_t: Tensor, total: int, callback: Any, inputs: Sequence[str]
    ) -> Tensor:
        """Take the steps, with a bar and the user's callback after each, and return x_0."""
        self._interrupt = False
        with self._evaluating(), self.progress_bar(total=total) as bar:
            for step in steps:
                if callback is not None:
                    tensors = {"image": step.prev_sample, "pred_original_sample": step.pred_original_sample}
                    changed = callback(self, step.index, step.timestep, {name: tensors[name] for name in inputs}) or {}
                    step.prev_sample = changed.get("image", step.prev_sample)
                x_t = step.prev_sample
                bar.update()
                if self._interrupt:
                    break
        return x_t

    def as_output(self, x_0: Tensor, output_type: str) -> Any:
        """Return images `[B, C, H, W]` in the [-1, 1] scale as `pil`, `np` or `pt`; see `check_finite`."""
        self.check_finite(x_0)
        images = (x_0 / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array) if len(array) else []

    def check_finite(self, x_0: Tensor) -> None:
        """Raise a NotFiniteError for NaN and infinities; it names the weight that is to blame, if one is."""
        if x_0.isfinite().all():
            return
        check_weights(self.unet)
        dtype = str(self.network.dtype).removeprefix("torch.")
        hints = {"float16": "; float16 ends at 65504, use bfloat16 or float32", "float32": ""}
        what = f"the network, in {dtype}, or {type(self.scheduler).__name__} made NaN or infinities on the way"
        raise NotFiniteError(f"the images are not finite: {what}{hints.get(dtype, '; try float32')}")

    def _start_of(self, strength: float | None, inpainting: bool) -> int:
        """Return where in the chain to enter with a given image."""
        if strength is None and inpainting:
            return 0
        if strength is None or not 0 <= strength <= 1:
            what = "--image needs --strength (the share of the chain to go back) or a --mask_image"
            raise UserError(f"{what}; --strength must be between 0 and 1, got {strength}")
        steps = len(self.scheduler.timesteps)
        start = steps - min(round(steps * strength), steps)
        # second-order solvers come to their timesteps twice, and start with the step that is taken from one
        return start if start == steps else start - start % getattr(self.scheduler, "order", 1)

    def _noisy_start(self, source: Generators, batch_size: int, image: Tensor | None = None, start: int = 0) -> Tensor:
        """Return x_T; where an image is given, that image with the noise of the chain's timestep number `start`."""
        noise = standard_normal((batch_size, *self.image_shape), source, self._execution_device, torch.float32)
        if image is None:
            return noise * self.scheduler.init_noise_sigma
        left = self.scheduler.timesteps[start:]
        if not len(left):
            return image  # strength 0 leaves no step to take
        return self.scheduler.add_noise(image, noise, left[:1].expand(batch_size).to(noise.device))

    @torch.no_grad()
    def denoise(
        self, x_t: Tensor, generator: Generators = None, *, start: int = 0, stop: int | None = None, **options: Any
    ) -> Iterator[DenoisingStep]:
        """Take the chain's steps `start` to `stop` (all by default), and yield a `DenoisingStep` each.

        x_t is `[B, C, H, W]` float32, noisy as at `scheduler.timesteps[start]`. A step's `prev_sample` may be
        replaced; the next one starts from there. `options` are `num_inference_steps`, `class_labels`,
        `guidance_scale`, `guidance_interval`, `epsilon_scale` and `eta`, as in `__call__`.
        """
        set_timesteps(self.scheduler, self.checked_steps(options.pop("num_inference_steps", None)))
        denoiser = self._denoiser(generator, len(x_t), **options)
        with self._evaluating():
            yield from denoiser.steps(x_t, start, stop)

    def _evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self.unet, *([] if self.guide is None else [self.guide.unet]))

    def _denoiser(
        self,
        generator: Generators,
        count: int,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
        eta: Any = None,
        **adjust: Any,
    ) -> Denoiser:
        """Return what takes steps down the chain that is set, with its options checked."""
        if self.distilled_steps and (eta or guidance_scale != 1 or any(adjust.values())):
            what = (
                f"a distilled model takes no {', '.join(f'--{name}' for name in ['eta', 'guidance_scale', *adjust])}"
            )
            raise UserError(f"{what}; leave them out (its teacher is guided, by ddpm-hf distill --guidance_scale)")
        checked_eta(self.scheduler, eta)
        guide, T = self.guide, self.scheduler.config.num_train_timesteps
        if guide is not None:
            check_guide(self, guide)
            guide.to(self._execution_device)
        adjustment = Adjustment.checked(T, guidance_scale, guide=None if guide is None else guide.network, **adjust)
        if adjustment.scales and (done := self.unet.config.get("_epsilon_scale")) is not None:
            what = f"this network's epsilon is divided by {done['b']:g} already"
            raise UserError(f"{what}; leave --epsilon_scale out, or take the model that it was made from")
        labels = self.classes.checked(class_labels, 1.0 if guide is not None else guidance_scale, count)
        labels = None if labels is None else labels.to(self._execution_device)
        return Denoiser(self.network, self.scheduler, generator, labels, adjustment, eta)

    def progressive(
        self, batch_size: int | None = None, generator: Generators = None, *, seeds: Any = None, **options: Any
    ) -> Iterator[DenoisingStep]:
        """Yield a `DenoisingStep` per step, from x_T on (Section 4.3); see `__call__`, and `denoise` for `options`."""
        self.checked_steps(options.get("num_inference_steps"))
        batch_size, source = count_and_generators(batch_size, generator, seeds, self._execution_device)
        yield from self.denoise(self._noisy_start(source, batch_size), source, **options)

    @property
    def distilled_steps(self) -> int | None:
        """How many steps a distilled model takes, which can do no other number; `None` for other models."""
        return self.unet.config.get(DISTILLED_STEPS)

    def checked_steps(self, num_inference_steps: int | None) -> int:
        """Return the number of sampler steps, T or a distilled model's own for `None`, or raise a UserError."""
        own = self.distilled_steps
        if own is not None and num_inference_steps not in (None, own):
            what = f"this model is distilled for --num_inference_steps {own}"
            raise UserError(f"{what}, and can do no other number, got {num_inference_steps}")
        return checked_steps(self.scheduler, own or num_inference_steps)

    def network_evaluations(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Any = None,
        **others: Any,
    ) -> int:
        """Return how often a network is evaluated for an image from noise; the arguments are those of `__call__`.

        Once for each timestep that the sampler sets (Heun's K steps are 2K - 1), twice where it is guided.
        """
        set_timesteps(self.scheduler, self.checked_steps(num_inference_steps))
        T, timesteps = self.scheduler.config.num_train_timesteps, self.scheduler.timesteps.tolist()
        adjustment = Adjustment.checked(T, guidance_scale, guidance_interval)
        return sum(1 + adjustment.guides(t) for t in timesteps)

    @property
    def classes(self) -> Classes:
        """What the network knows of classes."""
        return Classes.of(self.unet.config)

    def check_images_fit(self, data: Any) -> None:
        """Raise a UserError unless images (`data.load_images`) are as large as the network's, and pixel values."""
        if (shape := tuple(data.image_shape)) != self.image_shape:
            own = f"the images of {data.name!r} are {shape} (channels, height, width)"
            raise UserError(f"{own}, and the model makes {self.image_shape}")
        if (values := getattr(data, "images", None)) is not None and values.dtype != torch.uint8:
            what = f"the images of {data.name!r} are {values.dtype}"
            raise UserError(f"{what}; give pixel values from 0 to 255 as torch.uint8")


def load_named(flag: str, name: str, as_ddpm: bool = False, **options: Any) -> DDPMPipeline:
    """Load the model that a flag names, or raise a UserError: it cannot be loaded, or is not finite.

    With `as_ddpm` it gets a `DDPMScheduler` over its own betas. `options` are those of `from_pretrained`.
    """
    logging.disable_progress_bar()  # loading takes no time worth a bar
    try:
        pipe = DDPMPipeline.from_pretrained(name, **options)
        check_weights(pipe.unet)  # before hours of work, not after them
        if as_ddpm:
            check_is_ddpm(pipe.scheduler)
            pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {flag} {name}: {first_line(error)}") from error
    return pipe


def _check_published_weights(safe_serialization: bool = True, variant: str | None = None) -> None:
    """Raise a UserError for anything but safetensors under their usual names."""
    if not safe_serialization:
        raise UserError("safe_serialization=False would publish a pickle; leave it out for safetensors")
    if variant:
        advice = "push without variant, after pipe.to(torch.float16) for smaller weights"
        raise UserError(f"variant={variant!r} alone does not open with from_pretrained as the card says; {advice}")


def _push(folder: Any, repo_id: str, private: bool | None = None, **options: Any) -> str:
    """Push a folder as `ddpm-hf push` does; `options` are those of `hub.publish.Push`, where `None` is its default."""
    hub = importlib.import_module("ddpm_hf.hub.publish")  # by its name: `hub` stands above this module
    options = {name: value for name, value in options.items() if value is not None}
    return hub.Push(str(folder), repo_id, private=private is not False, **options).run()


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Keep modules in evaluation mode (no dropout) inside, and as they were afterwards."""
    were_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, were_training, strict=True):
            module.train(was_training)


@contextmanager
def without_bar(pipe: DDPMPipeline) -> Iterator[None]:
    """Show no progress bar inside, and do afterwards what the pipeline did before."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
