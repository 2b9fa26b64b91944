"""The diffusion process of Ho et al. 2020 (arXiv 2006.11239): q(x_t|x_0), q(x_{t-1}|x_t,x_0) and p(x_{t-1}|x_t).

Equation numbers are the paper's. Timesteps count from 0 as in the official code: `t` here is the paper's t minus 1,
and x_{-1} is the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as StockDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from ..presets import get_preset
from ..utils.errors import UserError, named_as_typed
from ..utils.hub_errors import PrivateByDefault
from ..utils.randomness import Generators, standard_normal
from .noise_schedule import (
    OFFICIAL_SCHEDULES,
    Chain,
    check_betas,
    check_choice,
    is_number,
    make_betas,
    rescale_zero_terminal_snr,
)
from .tables import ProcessTables, Settings, number_of_steps, spaced_timesteps, whole_number

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
_SMALL, _LARGE = ("fixed_small", "fixed_small_log"), ("fixed_large", "fixed_large_log")
FIXED_VARIANCES = (*_SMALL, *_LARGE)
LEARNED_VARIANCES = ("learned", "learned_range")
OPTIMAL_VARIANCE = "optimal"
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

# What a saved `prediction_type` ends with where the network also predicts the log-variance.
_ON_DISK_LEARNED = "_and_log_variance"

# Settings that the tables are made from: changed afterwards, they would contradict the tables.
_FIXED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")

logger = logging.get_logger(__name__)

Timestep = int | Tensor


class DDPMScheduler(ProcessTables, PrivateByDefault, StockDDPMScheduler):
    """Ho et al.'s diffusion process, exact to the official code, with the interface of `diffusers.DDPMScheduler`.

    Arguments, their defaults and the saved configuration are stock's; a saved scheduler opens in stock diffusers.
    The coefficients are float64 tables, cast where they are used. What is set after construction counts, or is
    refused: `register_to_config(prediction_type=...)`, `timesteps`, and one of `betas`, `alphas` and `alphas_cumprod`
    (float32 as in stock), which the other two follow and which is saved as `trained_betas`; assigned, or written in
    place (in a compiled `step`, once one of them was read again outside of it). The last step of the chain, whatever
    its timestep, gives the mean (Algorithm 2).

    In all methods x_0, x_t and noise are floating-point `[B, ...]`, computed in float32 at least; t is an int, a 0-d
    tensor or `[B]`, from 0 to T-1. Shapes that do not fit and a t outside the schedule raise a `ValueError`.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: The forward process; see `make_betas`. The official code's
            schedules are saved as `trained_betas`.
        variance_type: The reverse process's variance. `fixed_small` is beta_tilde_t, `fixed_large` is beta_t
            (Section 3.2; the same with `_log`). `learned` and `learned_range` read it from the second half of the
            network's channels: the log-variance itself as in the official code, or a share between the two
            (Nichol & Dhariwal 2021). `optimal` needs `set_prediction_error`, and is `fixed_small` for stock.
        clip_sample, clip_sample_range: Clip the predicted x_0 to `[-range, range]`.
        prediction_type: What the network predicts: `epsilon` (Eq. 12), `sample` (x_0), `v_prediction` (Salimans & Ho
            2022), or `posterior_mean`: mu-tilde (Table 2; the official code's `xprev`), with which stock refuses to
            sample.
        thresholding, dynamic_thresholding_ratio, sample_max_value: Imagen's dynamic thresholding instead of clipping.
        timestep_spacing, steps_offset: How `set_timesteps` chooses fewer than T timesteps.
        rescale_betas_zero_snr: Shift the schedule so that alpha_bar_T = 0 (Lin et al. 2023).

    Raises:
        ValueError: An argument is outside its range; the message says which value and what to write instead.
    """

    _warned_of_fixed_large = False
    # EDM's process is another one: its networks see sigma instead of t.
    _compatibles: ClassVar = [name for name in StockDDPMScheduler._compatibles if name != "EDMEulerScheduler"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        # Stock's __init__ is not called: decorated as well, it would write its defaults over this configuration, and
        # its tables are float32.
        self.__module__ = StockDDPMScheduler.__module__  # what pipelines record as the component's library
        if isinstance(prediction_type, str) and prediction_type.endswith(_ON_DISK_LEARNED):  # see to_json_string
            self.register_to_config(prediction_type=prediction_type.removesuffix(_ON_DISK_LEARNED))
        self._check_settings(self.config)
        if (T := whole_number("num_train_timesteps", num_train_timesteps)) < 1:
            raise UserError(f"num_train_timesteps must be a positive whole number, got {T}")
        if trained_betas is None:
            betas = make_betas(beta_schedule, T, beta_start, beta_end)
        else:
            try:
                betas = np.array(torch.as_tensor(trained_betas, dtype=torch.float64).tolist())
            except (TypeError, ValueError):
                raise UserError(f"trained_betas must be a list of numbers, got {trained_betas!r}") from None
            if betas.shape != (T,):
                raise UserError(f"trained_betas has {betas.size} values for num_train_timesteps={T}; give T of them")
        if trained_betas is not None or beta_schedule in OFFICIAL_SCHEDULES:
            self._save_betas(betas)
        check_betas(betas, may_end_at_1=beta_schedule == "jsd" or trained_betas is not None)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)

        self.one, self.init_noise_sigma, self.custom_timesteps = torch.tensor(1.0), 1.0, False
        self.num_inference_steps: int | None = None
        self._begin(betas)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DDPMScheduler:
        """Return the scheduler of one of the paper's experiments (`presets.py`), with some arguments replaced."""
        return cls(**{**get_preset(name).scheduler, **overrides})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler as stock does; the configuration of a scheduler without betas raises a `ValueError`.

        Another schedule in `kwargs` takes the place of the configuration's `trained_betas`, which would hide it.
        """
        if isinstance(config, dict) and "beta_schedule" not in {**config, **kwargs}:
            # of another class's scheduler or file; a file of these classes may leave out what is its default
            origin = config.get("_class_name", "another scheduler" if "_use_default_values" in config else None)
            if origin not in (None, *cls._compatibles):
                raise UserError(f"the configuration of {origin} has no betas; the paper's are beta_schedule='linear'")
        if kwargs.keys() & {"beta_schedule", "beta_start", "beta_end"}:
            kwargs.setdefault("trained_betas", None)
        if isinstance(config, dict) and "_variance_type" in config:  # see to_json_string
            config = dict(config)
            config["variance_type"] = config.pop("_variance_type")
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if isinstance(made, tuple) else made
        if (error := scheduler.config.get("_prediction_error")) is not None:
            scheduler.set_prediction_error(error)
        return made

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """Draw x_t ~ q(x_t|x_0) (Eq. 4), `[B, ...]`; any of x_0, the noise and t may be one for all."""
        c, x_0, noise, dtype = self._mixed("original_samples", original_samples, noise, timesteps)
        # Eq. 4: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon
        return _affine(c["sqrt_alpha_bar"], x_0, c["sqrt_one_minus_alpha_bar"], noise).to(dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """Return v (Salimans & Ho 2022); arguments as `add_noise`."""
        c, x_0, noise, dtype = self._mixed("sample", sample, noise, timesteps)
        # v = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0
        return _affine(c["sqrt_alpha_bar"], noise, -c["sqrt_one_minus_alpha_bar"], x_0).to(dtype)

    def _mixed(self, name: str, x_0: Tensor, noise: Tensor, t: Timestep) -> tuple[dict[str, Any], Tensor, Tensor, Any]:
        """Return the coefficients at t, x_0 and noise in working precision, and the dtype of their mixture."""
        one_for_all = x_0.ndim and x_0.shape[1:] == noise.shape[1:] and 1 in (len(x_0), len(noise))
        if not one_for_all:
            _check_same_shape(name, x_0, "noise", noise)
        dtype = torch.promote_types(x_0.dtype, noise.dtype)
        working = torch.promote_types(_working_dtype(x_0), _working_dtype(noise))
        x_0, noise = x_0.to(working), noise.to(working)
        like = x_0 if len(x_0) >= len(noise) else noise
        return self._coefficients(self._process, t, like, broadcast=True), x_0, noise, dtype

    def q_mean_variance(self, x_0: Tensor, t: Timestep) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log-variance of q(x_t|x_0) (Eq. 4), which broadcast with `x_0`."""
        c = self._coefficients(self._process, t, x_0, as_tensors=True)
        mean = c["sqrt_alpha_bar"] * x_0.to(_working_dtype(x_0))
        return mean, c["sqrt_one_minus_alpha_bar"].square(), c["log_one_minus_alpha_bar"]

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean mu-tilde, variance beta-tilde and log-variance of q(x_{t-1}|x_t,x_0) (Eqs. 6, 7).

        They broadcast with `x_0`. At t = 0 the variance is 0 and the log-variance that of t = 1, as officially.
        """
        _check_same_shape("x_0", x_0, "x_t", x_t)
        c = self._coefficients(self._process, t, x_0, as_tensors=True)
        x_0, x_t = x_0.to(_working_dtype(x_0)), x_t.to(_working_dtype(x_t))
        # Eq. 7: mu_tilde = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
        #                 + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
        mean = _affine(c["mean_from_x_0"], x_0, c["mean_from_x_t"], x_t)
        return mean, c["beta_tilde"], c["log_beta_tilde_clipped"]

    def get_target(self, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """Return what the network is asked to predict at `x_t = add_noise(x_0, noise, t)`, the shape of `x_0`."""
        _check_same_shape("x_0", x_0, "noise", noise)
        kind = self._prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x_0
        if kind == "v_prediction":
            return self.get_velocity(x_0, noise, t)
        return self.q_posterior(x_0, self.add_noise(x_0, noise, t), t)[0]

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of Algorithm 2, from x_t to the chain's next timestep (the data, where there is none).

        With fewer timesteps than T (`set_timesteps`), mean and variance are those of the subsequence's own posterior.

        Args:
            model_output: `[B, C, ...]`, or `[B, 2C, ...]` where the variance is learned.
            timestep: int, 0-d or `[B]` (one per image), each among `timesteps`.
            sample: x_t, `[B, C, ...]`.
            generator: One generator, or B of them (in stock's order), or `SeededNoise` of B seeds. Nothing is drawn
                where a single `timestep` is the last one.
            return_dict: `False` gives the tuple of x_{t-1} and the predicted x_0, shape and dtype of `sample`.
        """
        if isinstance(generator, (list, tuple)):
            generator = list(generator)  # randn_tensor knows lists only
            if len(generator) != len(sample):
                raise UserError(f"got {len(generator)} generators for a batch of {len(sample)}; pass one, or one each")
        chain = self._chain
        c = self._coefficients(chain, timestep, sample)
        clip = self._internal_dict.clip_sample or self._internal_dict.thresholding
        mean, log_variance, x_0 = self._reverse(chain, c, timestep, model_output, sample, clip)
        if self.variance_type == OPTIMAL_VARIANCE:
            log_variance = c["log_optimal_noise"]

        # Algorithm 2, lines 3 and 4: x_{t-1} = mu_theta(x_t, t) + sigma_t z, z ~ N(0, I), and z = 0 in the last step
        x_prev, has_previous = mean, c["has_previous"]
        if isinstance(has_previous, Tensor) or has_previous:
            z = standard_normal(sample.shape, generator, sample.device, sample.dtype).to(mean.dtype)
            if isinstance(log_variance, Tensor):
                x_prev = torch.addcmul(mean, torch.exp(0.5 * log_variance) * has_previous, z)
            else:
                x_prev = torch.add(mean, z, alpha=math.exp(0.5 * log_variance))

        x_prev, x_0 = x_prev.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(x_prev, x_0) if return_dict else (x_prev, x_0)

    def p_mean_variance(
        self, model_output: Tensor, t: Timestep, x_t: Tensor, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean, variance and log-variance of p(x_{t-1}|x_t) (Eq. 1) and the predicted x_0, like `x_t` each.

        Over all T timesteps. At t = 0 the fixed variances are beta_tilde at t = 1, as in the official code.
        `clip_denoised` clips (or thresholds) the predicted x_0, as sampling and the likelihood do.
        """
        c = self._coefficients(self._process, t, x_t, as_tensors=True)
        mean, log_variance, x_0 = self._reverse(self._process, c, t, model_output, x_t, clip_denoised)
        log_variance = log_variance.expand_as(mean)
        return mean, log_variance.exp(), log_variance, x_0

    def _reverse(
        self, chain: Chain, c: dict[str, Any], t: Timestep, output: Tensor, x_t: Tensor, clip: bool
    ) -> tuple[Tensor, Any, Tensor]:
        """Return mean and log-variance of p(x_{t-1}|x_t) and the predicted x_0, in the working precision of `x_t`."""
        dtype = _working_dtype(x_t)
        output, raw_variance = self.split_output(output, x_t)
        output, x_t = output.to(dtype), x_t.to(dtype)
        kind = self._prediction_type
        undefined = chain.undefined.get(kind)
        if undefined and not torch.compiler.is_compiling():
            for value in undefined.intersection(torch.as_tensor(t).reshape(-1).tolist()):
                raise UserError(vanished(value, kind))

        # The predicted x_0. Eq. 15: x_0 = (x_t - sqrt(1 - alpha_bar_t) epsilon) / sqrt(alpha_bar_t); from a predicted
        # mean by Eq. 7, solved for x_0
        if kind == "sample":
            x_0 = output
        elif kind == "v_prediction":
            x_0 = _affine(c["sqrt_alpha_bar"], x_t, -c["sqrt_one_minus_alpha_bar"], output)
        else:
            x_0 = _affine(c[f"{kind}_from_x_t"], x_t, c[f"{kind}_from_output"], output)
        if clip and self._internal_dict.thresholding:
            x_0 = self._threshold_sample(x_0)
        elif clip:
            x_0 = x_0.clamp(-self._internal_dict.clip_sample_range, self._internal_dict.clip_sample_range)

        # The mean: Eq. 7 at the predicted x_0. A predicted mean is taken as it is over the whole chain, as in the
        # official code, which clips x_0 for display only; over fewer steps it is another chain's mean.
        if kind == "posterior_mean" and chain.is_whole:
            mean = output
        else:
            mean = _affine(c["mean_from_x_0"], x_0, c["mean_from_x_t"], x_t)

        # The variance. Section 3.2: sigma_t^2 = beta_tilde_t or beta_t
        if self.variance_type == "learned" and raw_variance is not None:
            return mean, raw_variance.to(dtype), x_0
        if raw_variance is not None:
            # Nichol & Dhariwal 2021, Eq. 15: Sigma = exp(v log beta_t + (1 - v) log beta_tilde_t), v in [0, 1]
            v = (raw_variance.to(dtype) + 1.0) / 2.0
            return mean, v * c["log_beta"] + (1.0 - v) * c["log_beta_tilde_clipped"], x_0
        if self.variance_type == OPTIMAL_VARIANCE:
            self.check_variance()
            return mean, c["log_optimal"], x_0
        return mean, c["log_beta_tilde_clipped" if self.variance_type in _SMALL else "log_beta_clipped"], x_0

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output into (prediction, raw variance or `None`), each the shape of `x_t`."""
        if x_t.ndim < 2:
            raise UserError(f"a sample must have the shape [B, C, ...], got {tuple(x_t.shape)}")
        channels, learned = x_t.shape[1], self.variance_type in LEARNED_VARIANCES
        wanted = (x_t.shape[0], channels * (2 if learned else 1), *x_t.shape[2:])
        if tuple(model_output.shape) != wanted:
            given = f"a sample of shape {tuple(x_t.shape)} and variance_type={self.variance_type!r}"
            raise UserError(
                f"model_output must have shape {wanted} for {given}, got {tuple(model_output.shape)}; 'learned' or "
                f"'learned_range' needs a network with out_channels={2 * channels}, any other one with {channels}"
            )
        return model_output.split(channels, dim=1) if learned else (model_output, None)

    def _coefficients(
        self, chain: Chain, t: Timestep, like: Tensor, as_tensors: bool = False, broadcast: bool = False
    ) -> dict[str, Any]:
        """Return the chain's numbers at t: Python floats (no kernels) or tensors that broadcast with `like`."""
        dtype = _working_dtype(like)  # a `t` on an accelerator is not checked: that would wait
        if torch.compiler.is_compiling() or (isinstance(t, Tensor) and t.device.type != "cpu"):
            return chain.gather(torch.as_tensor(t).reshape(-1), like, dtype)
        if not isinstance(t, Tensor):
            values = [whole_number("a timestep", t)]
        elif t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise UserError(f"timesteps must be whole numbers, got a tensor of {t.dtype}")
        elif t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like)) and not (broadcast and len(like) == 1)):
            got = f"got shape {tuple(t.shape)} for a batch of {len(like)}"
            raise UserError(f"timesteps must be one number or one per image, {got}")
        else:
            values = t.reshape(-1).tolist()
        for value in set(values):
            chain.check(value)
        if as_tensors or (isinstance(t, Tensor) and t.ndim == 1):
            return chain.gather(torch.as_tensor(t).reshape(-1), like, dtype)
        return chain.row(values[0])

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Choose what `step` goes through: K = `num_inference_steps` timesteps, 1..T, or falling `timesteps` given.

        The last one steps to the data. Anything else raises a `ValueError`.
        """
        self._follow(but="timesteps")
        config, T = self._internal_dict, len(self._betas)
        if (num_inference_steps is None) == (timesteps is None):
            raise UserError("pass either num_inference_steps or timesteps, and not both")
        if timesteps is not None:
            chosen = self._falling(timesteps)
        else:
            K = number_of_steps(num_inference_steps, T)
            spacing, offset = config.timestep_spacing, config.steps_offset
            hint = f"; steps_offset={offset} leads beyond it, use 0" if offset else ""
            chosen = self._falling(spaced_timesteps(T, K, spacing, offset), hint)

        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self._use_timesteps(chosen, device=device)
        if self.variance_type in _LARGE and len(chosen) < T and not DDPMScheduler._warned_of_fixed_large:
            DDPMScheduler._warned_of_fixed_large = True  # the variance of many repositories
            better = "--variance_type optimal (after ddpm-hf optimal_variance) or fixed_small, or the ddim sampler"
            what = f"--variance_type '{self.variance_type}' over {len(chosen)} steps leaves noise in the images"
            logger.warning(named_as_typed(f"{what}; better: {better}"))

    def previous_timestep(self, timestep: Timestep) -> Timestep:
        """Return the chain's next timestep below `timestep`, or -1 where that is the data; its type is stock's."""
        chain, t = self._chain, whole_number("timestep", timestep)
        chain.check(t)
        if chain.is_whole and self.num_inference_steps is None:
            return timestep - 1
        return self._public["timesteps"].new_tensor(chain.previous[t])

    def set_prediction_error(self, error: Sequence[float] | Tensor) -> None:
        """Set how far the network's predicted x_0 is off, for `variance_type="optimal"`; saved with the rest.

        The best variance of p(x_{t-1}|x_t) is beta_tilde_t plus the squared weight of x_0 in the posterior's mean
        times this error (Theorem 1 of Bao et al. 2022, Analytic-DPM, for a perfect network).

        Args:
            error: `[T]`, the mean squared error of the predicted (and clipped) x_0 at every t, per pixel and in the
                [-1, 1] scale: `bits_per_dim(...).mse.mean(0)`, or `optimal_variance.prediction_error`.
        """
        T = self.config.num_train_timesteps
        values = torch.as_tensor(error, dtype=torch.float64).cpu()
        if values.shape != (T,) or not values.isfinite().all() or values.min() < 0:
            raise UserError(f"the prediction error must be {T} finite numbers from 0 on, got {list(values.shape)}")
        # seven digits are more than the measurement has
        self.register_to_config(_prediction_error=[float(f"{value:.7g}") for value in values.tolist()])
        self._make_chains()

    def check_variance(self) -> None:
        """Raise a `ValueError` where the variance is `optimal` and the network's error was not measured."""
        if self.variance_type == OPTIMAL_VARIANCE and self.config.get("_prediction_error") is None:
            advice = "run ddpm-hf optimal_variance, or call scheduler.set_prediction_error"
            raise UserError(f"--variance_type optimal needs the network's measured error: {advice}")

    def register_to_config(self, **kwargs: Any) -> None:
        """Change settings; bad values, and others of what the tables were made from, raise a `ValueError`."""
        # NumPy's and PyTorch's single numbers as Python's, which JSON knows
        plain = {n: x.item() if isinstance(x, (np.generic, Tensor)) and not x.ndim else x for n, x in kwargs.items()}
        if "_betas" in self.__dict__:
            for name in plain.keys() & _FIXED:
                if not np.array_equal(plain[name], self.config[name]):
                    raise UserError(f"{name} cannot change later; use DDPMScheduler.from_config(config, {name}=...)")
            self._check_settings({**self.config, **plain})
        super().register_to_config(**plain)
        self._internal_dict = Settings(self._internal_dict)

    @staticmethod
    def _check_settings(config: Any) -> None:
        """Check the settings that are read where they are used."""
        if config["variance_type"] is not None:  # stock's DPM-Solvers write null, which is stock's `fixed_small`
            known = (*FIXED_VARIANCES, OPTIMAL_VARIANCE, *LEARNED_VARIANCES)
            check_choice("variance_type", config["variance_type"], known)
        check_choice("prediction_type", config["prediction_type"], PREDICTION_TYPES)
        check_choice("timestep_spacing", config["timestep_spacing"], TIMESTEP_SPACINGS)
        whole_number("steps_offset", config["steps_offset"])
        for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
            if config[name] not in (True, False, None):
                raise UserError(f"{name} must be True or False, got {config[name]!r}")
        for name in ("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"):
            value, ratio = config[name], name == "dynamic_thresholding_ratio"
            if not is_number(value) or not (0 <= value <= 1 if ratio else 0 < value < math.inf):
                wanted = "from 0 to 1" if ratio else "above 0 and finite"
                raise UserError(f"{name} must be a number {wanted}, got {value!r}; clip_sample=False does not clip")

    @property
    def config(self) -> Any:
        """The settings in force."""
        if "_sampling_chain" in self.__dict__:  # else it is being made
            self._follow(but="timesteps")
        return self._internal_dict

    @property
    def _prediction_type(self) -> str:
        # Checked again: pipelines of diffusers put whole configurations into `_internal_dict`.
        check_choice("prediction_type", self._internal_dict.prediction_type, PREDICTION_TYPES)
        return self._internal_dict.prediction_type

    @property
    def variance_type(self) -> str:
        """The reverse process's variance; `fixed_small` where the configuration has none, as in stock."""
        return self._internal_dict.variance_type or "fixed_small"

    @variance_type.setter
    def variance_type(self, value: str) -> None:
        self.register_to_config(variance_type=value)

    def to_json_string(self) -> str:
        """Return the configuration as it is saved: stock's, changed where stock would sample nonsense from it."""
        self._follow(but="timesteps")
        config = json.loads(super().to_json_string())
        if self.variance_type == "learned":  # stock takes it for a variance; so it refuses to sample, and this class
            config["prediction_type"] += _ON_DISK_LEARNED  # takes the suffix off again
        if self.variance_type == "fixed_large_log":  # the same as `fixed_large`, and NaN in stock
            config["variance_type"] = "fixed_large"
        if self.variance_type == OPTIMAL_VARIANCE:  # with a note for this class
            config |= {"variance_type": "fixed_small", "_variance_type": OPTIMAL_VARIANCE}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def infinite_to_nan(x: Tensor) -> Tensor:
    """Replace infinities, which clipping would turn into pixel values, by NaN, in one kernel."""
    return torch.add(x, x, alpha=0)


def _affine(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """Return a x + b y in two kernels, for numbers or broadcasting tensors a and b."""
    if isinstance(b, Tensor):
        return torch.addcmul(x * a, y, b)
    return torch.add(x * a, y, alpha=b)


def _working_dtype(x: Tensor) -> torch.dtype:
    """Return the precision to compute in: float64 for float64, else float32."""
    if not x.is_floating_point():
        raise UserError(f"expected floating-point images in [-1, 1], got {x.dtype}; for uint8 use x / 127.5 - 1")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_same_shape(name_1: str, x_1: Tensor, name_2: str, x_2: Tensor) -> None:
    if x_1.shape != x_2.shape:
        got = f"got {tuple(x_1.shape)} and {tuple(x_2.shape)}"
        raise UserError(f"{name_1} and {name_2} must have the same shape, {got}")


def vanished(t: int, prediction_type: str) -> str:
    """Return the sentence about a timestep where nothing is left of the image."""
    advice = "use prediction_type='v_prediction' or 'sample' with this schedule, or timesteps that leave it out"
    return f"alpha_bar vanishes at t={t}, where {prediction_type!r} says nothing about x_0; {advice}"
