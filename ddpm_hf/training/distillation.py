"""Distillation into K deterministic steps (Salimans & Ho 2022, arXiv 2202.00512, without its halving of steps).

The teacher's probability flow leads from noise x_T through x_t at K of its timesteps to an image. Each of the
student's K steps, by stock's `DDIMScheduler`, is to lead from one of them to the next. Nothing but noise, and classes,
is needed: the teacher makes the images.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.tensors import ImageDataset
from ..diffusion.distributions import mean_flat
from ..models.inference import InferenceNetwork, InferenceOptions
from ..models.unet_2d import UNet2DModel
from ..pipelines.adjustment import Adjustment
from ..pipelines.denoising import Denoiser
from ..pipelines.pipeline_ddpm import DDPMPipeline, load_named, name_on_hub
from ..pipelines.schedulers import DISTILLED_STEPS
from ..presets import DISTILLATION, Preset
from ..utils.digests import weights_digest
from ..utils.errors import NotFiniteError, UserError
from ..utils.processes import raise_on_all_ranks
from ..utils.progress import progress_bar
from ..utils.randomness import SeededNoise, derive_seed
from ..utils.text import recorded_name
from .configuration import DistillationConfig

# Without gradients, so many times as many images fit on a device as in training.
_TIMES_THE_BATCH = 4


@dataclass
class Distillation:
    """A teacher, and at which of its timesteps the student samples."""

    name: str  # the teacher's, as it may be published
    base_model: str | None  # its name on the Hub, if it has one
    digest: str  # SHA-256 of its weights
    teacher: DDPMPipeline
    steps: int  # K
    times: list[int]  # where the teacher is evaluated, from high to low, a multiple of K
    guidance_scale: float
    num_trajectories: int = 1

    def __post_init__(self) -> None:
        # [T + 1] each, the data last, where index -1 finds it
        alpha_bar = np.append(self.teacher.scheduler.alpha_bar, 1.0)
        self._alpha, self._sigma = np.sqrt(alpha_bar).tolist(), np.sqrt(1 - alpha_bar).tolist()
        self._points = self.times[:: len(self.times) // self.steps]  # the teacher's timesteps that the student knows
        T, K = len(alpha_bar) - 1, self.steps
        # A step of stock's DDIM is T // K timesteps long. They are far apart, so that the time embedding tells them
        # from each other.
        self._stride = T // K
        self._own_times = torch.arange(K, 0, -1) * self._stride - 1
        # [K] each: alpha_t and sigma_t at the points, alpha_s and sigma_s at the next ones
        columns = (
            [values[t] for t in times]
            for times in (self._points, [*self._points[1:], -1])
            for values in (self._alpha, self._sigma)
        )
        self._levels = torch.tensor(list(columns))

    @classmethod
    def load(cls, config: DistillationConfig) -> "Distillation":
        """Load the teacher, or raise a UserError: it cannot be loaded or distilled, or its chain is too short."""
        model, K = str(config.model), config.steps
        pipe = load_named("--model", model, as_ddpm=True, dtype=torch.float32)
        scheduler = pipe.scheduler
        if pipe.distilled_steps:
            raise UserError(f"--model {model} is distilled already; give the model that it was made from")
        kind, learned = scheduler.config.prediction_type, "learned" in (scheduler.config.variance_type or "")
        if kind == "posterior_mean" or learned:
            what = "its variance" if learned else "the posterior's mean"
            need = "epsilon, sample or v_prediction with a fixed variance"
            raise UserError(f"--model {model} predicts {what}, which cannot be distilled; a teacher needs {need}")
        T = scheduler.config.num_train_timesteps
        if config.teacher_steps % K or config.teacher_steps > T:
            what = f"--teacher_steps must be a multiple of --steps, and at most the teacher's T = {T}"
            raise UserError(f"{what}; got {config.teacher_steps} and {K}")
        pipe.classes.checked(0 if pipe.classes.count else None, config.guidance_scale, 1)
        pipe.unet.requires_grad_(False).eval()
        times = evenly_in_angle(scheduler.alpha_bar, config.teacher_steps)
        name, base, digest = recorded_name(model), name_on_hub(model), weights_digest(pipe.unet)
        return cls(name, base, digest, pipe, K, times, config.guidance_scale, config.num_trajectories)

    @property
    def record(self) -> dict[str, Any]:
        """What checkpoints keep of it, and a resumed run has to share."""
        guided = f", guided by {self.guidance_scale:g}" * (self.guidance_scale != 1)
        points = ", ".join(map(str, self._points))
        return {
            "model": self.name,
            "base_model": self.base_model,
            "digest": self.digest,
            "description": f"DDIM steps from t = {points} of {len(self.times)} steps of the teacher{guided}, in v",
            "teacher_timesteps": self.times,
        }

    @property
    def preset(self) -> Preset:
        """The default recipe, with the teacher's network and schedule, and the student's sampler."""
        known = ("_class_names", "_null_class")
        unet = {n: v for n, v in self.teacher.unet.config.items() if not n.startswith("_") or n in known}
        unet |= {"dropout": 0.0, DISTILLED_STEPS: self.steps}
        sampler = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
        process = {"num_train_timesteps": self.steps * self._stride, "trained_betas": self._betas(), **sampler}
        return dataclasses.replace(DISTILLATION, unet=unet, scheduler=process | {"set_alpha_to_one": True})

    def _betas(self) -> list[float]:
        """Return the student's schedule: alpha_bar as at the points, and between them as in a cosine schedule."""
        # arctan(sigma / alpha) is 0 at the data, and grows by equal steps from point to point
        angles = [math.atan2(self._sigma[t], self._alpha[t]) for t in (-1, *reversed(self._points))]
        t = np.arange(-1, self.steps * self._stride)
        alpha_bar = np.cos(np.interp(t, [-1, *self._own_times.flip(0).tolist()], angles)) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()

    def initialize(self, unet: UNet2DModel) -> None:
        """Start from the teacher's weights, with a time embedding that takes the student's timesteps for the points'.

        Its last layer is changed: to the one that does so exactly and is nearest to the teacher's.
        """
        unet.load_state_dict(self.teacher.unet.state_dict())
        embedding = unet.time_embedding
        with torch.no_grad():
            of_points, own = (
                embedding.act(embedding.linear_1(unet.time_proj(t.to(unet.device)).to(unet.dtype)))
                for t in (torch.tensor(self._points), self._own_times)
            )  # [K, D] each
            change = embedding.linear_2(of_points) - embedding.linear_2(own)
            # Of least norm with own @ nearest = change; on the CPU, as not all devices have float64.
            nearest = torch.linalg.pinv(own.cpu().double()) @ change.cpu().double()
            embedding.linear_2.weight += nearest.T.to(embedding.linear_2.weight)

    def trajectories(
        self, seed: int, accelerator: Accelerator, batch_size: int, compiled: bool = False
    ) -> ImageDataset:
        """Follow the teacher from noise to images; every process its share, and all get all.

        Args:
            seed: The run's. The noise of a trajectory is a function of it and of the trajectory's number.
            accelerator: Processes and precision.
            batch_size: What fits in training.
            compiled: Whether the teacher is.

        Returns:
            The points of the trajectories as images of (K + 1) C channels, `[N, (K + 1) C, H, W]` float32 on the host;
            all classes as often, "no class" among them.

        Raises:
            UserError: They do not fit into memory, or (NotFiniteError) the teacher makes NaN of some noise.
        """
        device, classes, processes = accelerator.device, self.teacher.classes, accelerator.num_processes
        (C, H, W), N = self.teacher.image_shape, self.num_trajectories
        if (size := 4 * N * (self.steps + 1) * C * H * W) > psutil.virtual_memory().available:
            raise UserError(f"--num_trajectories {N} take {size / 1e9:.0f} GB, and this machine has less; give fewer")
        points = self.new_points("cpu")
        self._own_times, self._levels = self._own_times.to(device), self._levels.to(device)
        precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        unet = self.teacher.unet.to(device)
        network = InferenceNetwork(unet, InferenceOptions.for_device(device, precision, compiled))
        with progress_bar(N, "the teacher's trajectories", "image", accelerator.is_main_process) as bar:
            for start in range(0, N, _TIMES_THE_BATCH * batch_size * processes):
                rows = points[start : start + _TIMES_THE_BATCH * batch_size * processes]
                share = -(-len(rows) // processes)
                first = start + share * accelerator.process_index
                with raise_on_all_ranks():
                    numbers = range(first, first + share)
                    noise = SeededNoise([derive_seed(seed, "trajectory", number) for number in numbers], device)
                    labels = None if classes.count is None else torch.tensor(numbers, device=device) % classes.count
                    made = self.trajectory(noise.normal((share, C, H, W)), labels, network)
                    if not made.isfinite().all():  # every update that sees one of them would be skipped
                        raise NotFiniteError(f"--model {self.name} makes NaN or infinities, in {precision}")
                rows.copy_(accelerator.gather(made.transpose(0, 1).flatten(1, 2))[: len(rows)])
                bar.update(len(rows))
        unet.to("cpu")  # the student needs the memory
        return self.images(points)

    def new_points(self, device: str) -> Tensor:
        """Return room for the trajectories, `[N, (K + 1) C, H, W]`."""
        C, H, W = self.teacher.image_shape
        return torch.empty(self.num_trajectories, (self.steps + 1) * C, H, W, device=device)

    def images(self, points: Tensor) -> ImageDataset:
        """Return the points of trajectories 0, 1, ... as images, with their classes."""
        classes = self.teacher.classes
        labels = None if classes.count is None else torch.arange(len(points)) % classes.count
        names = [name for i, name in enumerate(classes.all_names()) if i != classes.null]
        return ImageDataset(points, labels, f"images made by {self.name}", names)

    def trajectory(self, x_T: Tensor, class_labels: Tensor | None = None, network: Any = None) -> Tensor:
        """Follow the teacher's probability flow from noise, by DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2).

        Args:
            x_T: Standard normal, `[B, C, H, W]`.
            class_labels: `[B]`, for class-conditional teachers.
            network: The teacher's, made faster.

        Returns:
            x_t at the K points and the teacher's image, `[K + 1, B, C, H, W]`.
        """
        scheduler, times = self.teacher.scheduler, torch.tensor(self.times, device=x_T.device)
        clip = scheduler.config.clip_sample or scheduler.config.thresholding
        network = network or self.teacher.unet
        denoiser = Denoiser(network, scheduler, None, class_labels, Adjustment(self.guidance_scale))
        x_t, points, before, h_before = x_T, [], None, math.inf
        with torch.no_grad():
            for i, (t, s) in enumerate(pairwise([*self.times, -1])):
                if t in self._points:
                    points.append(x_t)
                output = denoiser.predict(x_t, times[i], self.guidance_scale != 1)
                x_0 = scheduler.p_mean_variance(output, times[i], x_t, clip)[3]
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

    def loss(
        self, unet: Any, scheduler: Any, points: Tensor, t: Tensor, noise: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Return the squared error of the student's v, `[B]`; see `objectives`.

        Args:
            unet: The student's network.
            scheduler: Not used, as is `noise`.
            points: Of trajectories, `[B, (K + 1) C, H, W]`.
            t: In 0 to T - 1, `[B]`; of the student's timesteps the next one up is taken.
            noise: Not used.
            class_labels: `[B]`, for class-conditional networks.
        """
        k = self.steps - 1 - t // self._stride  # [B], which step of the chain
        points = points.unflatten(1, (self.steps + 1, -1))
        row = torch.arange(len(t), device=t.device)
        x_t, x_s = points[row, k], points[row, k + 1]
        labels = {} if class_labels is None else {"class_labels": class_labels}
        v = unet(x_t, self._own_times[k], **labels).sample.float()
        return mean_flat((v - self.target(x_t, x_s, k)).square())

    def target(self, x_t: Tensor, x_s: Tensor, k: Tensor) -> Tensor:
        """Return the v whose DDIM step, the `k`-th of the chain (`[B]`), leads from x_t to x_s, `[B, C, H, W]`."""
        alpha, sigma, alpha_s, sigma_s = self._levels[:, k, None, None, None]
        ratio = sigma_s / sigma
        # x_s = alpha_s x_0 + r (x_t - alpha_t x_0) with r = sigma_s / sigma_t (Salimans & Ho 2022, Eq. 9)
        x_0 = (x_s - ratio * x_t) / (alpha_s - ratio * alpha)
        return (alpha * x_t - x_0) / sigma


def evenly_in_angle(alpha_bar: np.ndarray, n: int) -> list[int]:
    """Return n falling timesteps from T - 1 on, evenly spaced in arctan(sigma_t / alpha_t) down to the data.

    As in a cosine schedule, which progressive distillation samples uniformly (Salimans & Ho 2022, Section 2).
    """
    angle = np.arctan2(np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar))
    times: list[int] = []
    for i in range(n):
        t = int(np.abs(angle - angle[-1] * (1 - i / n)).argmin())
        times.append(max(min(t, times[-1] - 1 if times else t), n - 1 - i))  # they differ where T is small
    return times
