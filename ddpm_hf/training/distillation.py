"""Distillation into K deterministic steps (Salimans & Ho 2022, arXiv 2202.00512, without its halving of steps).

The teacher's probability flow leads from noise x_T through x_t at the student's K timesteps to an image. Each of the
student's steps, by stock's `DDIMScheduler`, is to lead from one of them to the next. Nothing but noise, and classes,
is needed: the teacher makes the images.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from ..data.tensors import ImageDataset
from ..diffusion.distributions import mean_flat
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet_2d import check_weights
from ..pipelines.adjustment import Adjustment
from ..pipelines.denoising import Denoiser
from ..pipelines.pipeline_ddpm import INCLUDED_MODELS, DDPMPipeline
from ..pipelines.schedulers import DISTILLED_STEPS, check_is_ddpm
from ..presets import DISTILLATION, Preset
from ..utils.digests import weights_digest
from ..utils.errors import UserError, first_line
from ..utils.text import is_local, recorded_name
from .configuration import DistillationConfig


@dataclass
class Distillation:
    """A teacher, and at which timesteps its student samples."""

    name: str  # the teacher's, as it may be published
    base_model: str | None  # its name on the Hub, if it has one
    digest: str  # SHA-256 of its weights
    teacher: DDPMPipeline
    stops: list[int]  # the student's timesteps, from high to low
    times: list[int]  # where the teacher is evaluated, from high to low; the stops are among them
    guidance_scale: float

    def __post_init__(self) -> None:
        # [T + 1] each, the data last, where index -1 finds it
        alpha_bar = np.append(self.teacher.scheduler.alpha_bar, 1.0)
        self._alpha, self._sigma = np.sqrt(alpha_bar).tolist(), np.sqrt(1 - alpha_bar).tolist()
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the teacher, and the timesteps of both, to a device."""
        self.teacher.to(device)
        self._times, self._stops = (torch.tensor(times, device=device) for times in (self.times, self.stops))

    @classmethod
    def load(cls, config: DistillationConfig) -> "Distillation":
        """Load the teacher, or raise a UserError: it cannot be loaded or distilled, or its chain is too short."""
        model, K = str(config.model), config.steps
        logging.disable_progress_bar()  # loading takes no time worth a bar
        try:
            pipe = DDPMPipeline.from_pretrained(model, dtype=torch.float32)
            check_weights(pipe.unet)
            check_is_ddpm(pipe.scheduler)
            scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load --model {model}: {first_line(error)}") from error
        if pipe.distilled_steps:
            raise UserError(f"--model {model} is distilled already; give the model that it was made from")
        kind, learned = scheduler.config.prediction_type, "learned" in (scheduler.config.variance_type or "")
        if kind == "posterior_mean" or learned:
            what = "its variance" if learned else "the posterior's mean"
            need = "epsilon, sample or v_prediction with a fixed variance"
            raise UserError(f"--model {model} predicts {what}, which cannot be distilled; a teacher needs {need}")
        T = scheduler.config.num_train_timesteps
        if T % K or config.teacher_steps % K or config.teacher_steps > T:  # DDIM's step is T // K timesteps long
            what = f"--steps must divide the teacher's T = {T}, and --teacher_steps, which is at most T"
            raise UserError(f"{what}; got {K} and {config.teacher_steps}")
        pipe.classes.checked(0 if pipe.classes.count else None, config.guidance_scale, 1)
        pipe.unet.requires_grad_(False).eval()
        stops = list(range(T - 1, -1, -T // K))
        times = teacher_times(stops, config.teacher_steps // K)
        base = None if is_local(model) or model in INCLUDED_MODELS else model
        teacher = DDPMPipeline(pipe.unet, scheduler)
        name, digest = recorded_name(model), weights_digest(pipe.unet)
        return cls(name, base, digest, teacher, stops, times, config.guidance_scale)

    @property
    def record(self) -> dict[str, Any]:
        """What checkpoints keep of it, and a resumed run has to share."""
        guided = f", guided by {self.guidance_scale:g}" * (self.guidance_scale != 1)
        stops = ", ".join(map(str, self.stops))
        return {
            "model": self.name,
            "base_model": self.base_model,
            "digest": self.digest,
            "teacher_timesteps": self.times,
            "description": f"DDIM steps from t = {stops} of {len(self.times)} steps of the teacher{guided}, in v",
        }

    @property
    def preset(self) -> Preset:
        """The default recipe, with the teacher's network and schedule, and the student's sampler."""
        known = ("_class_names", "_null_class")
        unet = {n: v for n, v in self.teacher.unet.config.items() if not n.startswith("_") or n in known}
        unet |= {"dropout": 0.0, DISTILLED_STEPS: len(self.stops)}
        sampler = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
        process = {**_schedule(self.teacher.scheduler), **sampler, "set_alpha_to_one": True}
        return dataclasses.replace(DISTILLATION, unet=unet, scheduler=process)

    def images(self) -> ImageDataset:
        """Return what stands for the images of a run: black ones, of which only the classes are used, all as often."""
        classes = self.teacher.classes
        names = [name for i, name in enumerate(classes.all_names()) if i != classes.null]
        count, black = classes.count or 1, torch.zeros(1, *self.teacher.image_shape, dtype=torch.uint8)
        n = count * -(-1024 // count)
        labels = None if classes.count is None else torch.arange(n) % count
        return ImageDataset(black.expand(n, -1, -1, -1), labels, f"images made by {self.name}", names)

    def trajectory(self, x_T: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Follow the teacher's probability flow from noise, by DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2).

        Args:
            x_T: Standard normal, `[B, C, H, W]`.
            class_labels: `[B]`, for class-conditional teachers.

        Returns:
            x_t at the student's timesteps and the teacher's image, `[K + 1, B, C, H, W]`.
        """
        unet, scheduler = self.teacher.unet, self.teacher.scheduler
        clip = scheduler.config.clip_sample or scheduler.config.thresholding
        denoiser = Denoiser(unet, scheduler, None, class_labels, Adjustment(self.guidance_scale))
        x_t, points, before, h_before = x_T, [], None, math.inf
        with torch.no_grad():
            for i, (t, s) in enumerate(pairwise([*self.times, -1])):
                if t in self.stops:
                    points.append(x_t)
                output = denoiser.predict(x_t, self._times[i], self.guidance_scale != 1)
                x_0 = scheduler.p_mean_variance(output, self._times[i], x_t, clip)[3]
                # h = lambda_s - lambda_t, lambda = log(alpha / sigma); D = (1 + 1/2r) x_0 - 1/2r of the one before
                h = self._log_snr(s) - self._log_snr(t)
                direction = x_0
                if before is not None and math.isfinite(h):  # the step to the data is of first order
                    direction = torch.lerp(before, x_0, 1 + h / (2 * h_before))
                # x_s = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) D, which for D = x_0 is DDIM
                ratio = self._sigma[s] / self._sigma[t]
                x_t = ratio * x_t + (self._alpha[s] - ratio * self._alpha[t]) * direction
                before, h_before = x_0, h
        return torch.stack([*points, x_t])

    def _log_snr(self, t: int) -> float:
        """lambda_t; infinite at the data, and where alpha_bar vanishes."""
        alpha, sigma = self._alpha[t], self._sigma[t]
        return math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)

    def targets(self, points: Tensor) -> Tensor:
        """Return the v whose DDIM steps lead from each point of a trajectory to the next, `[K, B, C, H, W]`."""
        targets = []
        for (t, s), (x_t, x_s) in zip(pairwise([*self.stops, -1]), pairwise(points), strict=True):
            # x_s = alpha_s x_0 + r (x_t - alpha_t x_0) with r = sigma_s / sigma_t (Salimans & Ho 2022, Eq. 9)
            alpha, sigma, ratio = self._alpha[t], self._sigma[t], self._sigma[s] / self._sigma[t]
            x_0 = (x_s - ratio * x_t) / (self._alpha[s] - ratio * alpha)
            targets.append((alpha * x_t - x_0) / sigma)
        return torch.stack(targets)

    def loss(
        self, unet: Any, scheduler: Any, x_0: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Return the squared error of the student's v over its timesteps, `[B]`; see `objectives`.

        The images and t of a batch are not used: they are the teacher's, and all of the student's.
        """
        points = self.trajectory(noise, class_labels)
        K, timesteps = len(self.stops), self._stops.repeat_interleave(len(noise))
        labels = {} if class_labels is None else {"class_labels": class_labels.repeat(K)}
        v = unet(points[:-1].flatten(0, 1), timesteps, **labels).sample.float()
        return mean_flat((v - self.targets(points).flatten(0, 1)).square()).view(K, -1).mean(0)


def teacher_times(stops: list[int], per_step: int) -> list[int]:
    """Return falling timesteps, `per_step` from each of the student's on, evenly spaced down to the data at t = -1."""
    between = [np.linspace(t, s, per_step + 1)[:-1] for t, s in pairwise([*stops, -1])]
    return np.concatenate(between).round().astype(int).tolist()


def _schedule(scheduler: DDPMScheduler) -> dict[str, Any]:
    """Return the settings of a schedule that stock's `DDIMScheduler` knows: by name, or beta by beta."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    settings = {name: scheduler.config[name] for name in names}
    plain = settings["beta_schedule"] in ("linear", "scaled_linear", "squaredcos_cap_v2")
    if plain and scheduler.config.trained_betas is None and not scheduler.config.rescale_betas_zero_snr:
        return settings
    return settings | {"beta_schedule": "linear", "trained_betas": scheduler.betas.double().tolist()}
