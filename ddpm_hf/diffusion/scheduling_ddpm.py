"""The forward and reverse processes of the paper: q(x_t|x_0), q(x_{t-1}|x_t,x_0), p(x_{t-1}|x_t) and sampling.

Timesteps count from 0 as in the official code: `t` here is the paper's t minus 1, and x_{-1} is the data.
Equation numbers are those of Ho et al. 2020 (arXiv 2006.11239).
"""

from __future__ import annotations

import json
import math
import numbers
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as StockDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from ..presets import get_preset
from ..utils.errors import UserError
from ..utils.hub_errors import PrivateByDefault
from ..utils.randomness import Generators, standard_normal
from ..utils.text import nearest
from .noise_schedule import (
    OFFICIAL_SCHEDULES,
    STOCK_SCHEDULES,
    Chain,
    betas_of,
    first_outside,
    make_betas,
    rescale_zero_terminal_snr,
    tables_of,
)

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED_VARIANCES = ("learned", "learned_range")
OPTIMAL_VARIANCE = "optimal"
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

# What a saved `prediction_type` ends with where the network also predicts the log-variance.
_ON_DISK_LEARNED = "_and_log_variance"

# What the tables are made from: changed afterwards, it would say something else than the tables do.
_BUILT_INTO_TABLES = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)

logger = logging.get_logger(__name__)

Timestep = int | Tensor


def infinite_to_nan(x: Tensor) -> Tensor:
    """The same values, bit by bit, with NaN for infinities, in one kernel and without waiting for the device.

    An infinite prediction would be clipped into the range of images and look like one; NaN stays NaN to the end.
    """
    return torch.add(x, x, alpha=0)


def _version(x: Tensor) -> int:
    """How often a tensor was written to in place; 0 for those of inference mode, which do not count it."""
    return 0 if x.is_inference() else x._version


def _as_table(name: str, value: Any, T: int) -> Tensor:
    """One number per timestep of a user's as a floating-point tensor, the very same one where it can be watched."""
    try:
        table = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float32))
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a tensor of numbers, got {value!r}") from None
    if table.shape != (T,) or not table.is_floating_point():
        raise UserError(
            f"{name} must be {T} numbers, one per timestep, got {table.dtype} of shape {list(table.shape)}"
        )
    if table.is_inference():
        with torch.inference_mode(False):
            return table.clone()
    return table.detach() if table.requires_grad else table


def _affine(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a x + b y in two kernels, for numbers or broadcasting tensors a and b."""
    if isinstance(b, Tensor):
        return torch.addcmul(x * a, y, b)
    return torch.add(x * a, y, alpha=b)


def check_choice(name: str, value: Any, known: Sequence[str], otherwise: str = "") -> None:
    """Check that a setting is one of those that are known.

    Raises:
        UserError: It is not; names the nearest, and `otherwise` what else there is.
    """
    if value not in known:
        raise UserError(
            f"unknown {name} {value!r}{nearest(str(value), known)}; it must be one of {', '.join(known)}{otherwise}"
        )


class _Config(FrozenDict):
    """A configuration whose values cannot be overwritten in place, where `step` or what is saved would miss it."""

    def __setitem__(self, name: str, value: Any) -> None:
        self._check_new(name, value)
        super().__setitem__(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_new(name, value)
        super().__setattr__(name, value)

    def _check_new(self, name: str, value: Any) -> None:
        if name in self and name in self.__dict__ and not name.startswith("_"):
            raise UserError(f"config.{name} cannot be written to; use scheduler.register_to_config({name}={value!r})")


def _plain_number(value: Any) -> Any:
    """NumPy's and PyTorch's single numbers as Python's, which JSON knows."""
    return value.item() if isinstance(value, (np.generic, Tensor)) and value.ndim == 0 else value


class DDPMScheduler(PrivateByDefault, StockDDPMScheduler):
    """Ho et al.'s diffusion process, exact to the official code, with the interface of `diffusers.DDPMScheduler`.

    Arguments, their defaults and the saved configuration are stock's; a saved scheduler opens in stock diffusers.
    It computes with float64 tables, cast where they are used; `betas`, `alphas` and `alphas_cumprod` are float32 as in
    stock. What is set after construction counts, or is refused: `register_to_config(prediction_type=...)`, assigned
    `timesteps`, and an assigned `betas`, `alphas` or `alphas_cumprod`, which the other two follow and which is saved
    as `trained_betas`. So does what is written into these tensors in place (in a compiled `step`, once one of them was
    read again outside of it). Beyond stock:

    - `prediction_type="posterior_mean"`: the network predicts mu-tilde, the mean of q(x_{t-1}|x_t,x_0) (the paper's
      ablation, Table 2; `xprev` in the official code). Stock refuses to sample with it.
    - `beta_schedule` in `quad | const | jsd | warmup10 | warmup50` (the official code's), saved as `trained_betas`.
    - `variance_type="learned"`: the second half of the network's channels is the log-variance, as in the official
      code.
    - `variance_type="optimal"`: the variance that a measured error of the network makes best (Analytic-DPM, Bao et
      al. 2022); needs no training, only `set_prediction_error`. Stock sees `fixed_small`.
    - `step` takes an int, a 0-d tensor or one timestep per image.
    - Noise is added wherever the chain has a next timestep, and nowhere else: the last step gives the mean
      (Algorithm 2).

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: The forward process; see `make_betas`.
        variance_type: The reverse process's variance. `fixed_small` is beta_tilde_t, `fixed_large` is beta_t
            (Section 3.2; the same with `_log`), `optimal` is in between, by a measurement of the network, `learned`
            and `learned_range` read it from the network's output.
        clip_sample, clip_sample_range: Clip the predicted x_0 to `[-range, range]`.
        prediction_type: What the network predicts: `epsilon` (Eq. 12), `sample` (x_0), `v_prediction`
            (Salimans & Ho 2022) or `posterior_mean`.
        thresholding, dynamic_thresholding_ratio, sample_max_value: Imagen's dynamic thresholding instead of clipping.
        timestep_spacing, steps_offset: How `set_timesteps` chooses fewer than T timesteps.
        rescale_betas_zero_snr: Shift the schedule so that alpha_bar_T = 0 (Lin et al. 2023).

    Raises:
        ValueError: An argument is outside its range; the message says which value and what to write instead.
    """

    _internal_dict: Any  # the configuration
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
            prediction_type = prediction_type.removesuffix(_ON_DISK_LEARNED)
            self.register_to_config(prediction_type=prediction_type)
        self._check_settings(self.config)
        num_train_timesteps = self.config.num_train_timesteps
        if (
            isinstance(num_train_timesteps, bool)
            or not isinstance(num_train_timesteps, int)
            or num_train_timesteps < 1
        ):
            raise UserError(f"num_train_timesteps must be a positive whole number, got {num_train_timesteps!r}")

        if trained_betas is not None:
            try:
                betas = np.array(torch.as_tensor(trained_betas, dtype=torch.float64).tolist(), dtype=np.float64)
            except (TypeError, ValueError):
                raise UserError(f"trained_betas must be a list of numbers, got {trained_betas!r}") from None
        else:
            check_choice(
                "beta_schedule", beta_schedule, STOCK_SCHEDULES + OFFICIAL_SCHEDULES, ", or give trained_betas"
            )
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if trained_betas is not None or beta_schedule in OFFICIAL_SCHEDULES:
            # A list, as JSON knows neither arrays nor tensors; and no longer a default, or another scheduler's
            # `from_config` would leave it out.
            defaults = [name for name in self.config.get("_use_default_values", []) if name != "trained_betas"]
            self.register_to_config(trained_betas=betas.tolist(), _use_default_values=defaults)
        if betas.shape != (num_train_timesteps,):
            raise UserError(
                f"trained_betas has {betas.size} values for num_train_timesteps={num_train_timesteps}; "
                "give exactly one beta per timestep"
            )
        may_end_at_1 = beta_schedule == "jsd" or trained_betas is not None  # alpha_bar_T = 0
        if (t := first_outside(betas, may_end_at_1)) is not None:
            raise UserError(
                f"betas must lie strictly between 0 and 1, got {float(betas[t])!r} at t={t}; the paper's schedule is "
                "beta_schedule='linear' with beta_start=1e-4 and beta_end=0.02"
            )
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)

        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self._betas = betas
        self._public: dict[str, Tensor] = {}  # the tables and timesteps that users see and may write to
        self._seen: dict[str, int] = {}  # how often each of them had been written to when it was last looked at
        self._use_timesteps(np.arange(num_train_timesteps - 1, -1, -1), None, None)
        self._use_betas(betas)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DDPMScheduler:
        """The scheduler of one of the paper's experiments (`presets.py`), with some arguments replaced.

        Raises:
            ValueError: Unknown preset.
        """
        return cls(**{**get_preset(name).scheduler, **overrides})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As stock's, with what stock does not know: the network's measured error and the `optimal` variance.

        Another schedule in `kwargs` takes the place of the configuration's `trained_betas`, which would hide it.

        Raises:
            ValueError: The configuration of a scheduler that has no betas, or as the constructor.
        """
        if isinstance(config, dict) and "beta_schedule" not in {**config, **kwargs}:
            # of another class's scheduler or file; a file of these classes may leave out what is its default
            origin = config.get("_class_name", "another scheduler" if "_use_default_values" in config else None)
            if origin not in (None, *cls._compatibles):
                raise UserError(
                    f"the configuration of {origin} has no betas, so it does not say which DDPM this is; give "
                    "beta_schedule='linear' for the paper's"
                )
        if kwargs.keys() & {"beta_schedule", "beta_start", "beta_end"}:
            kwargs.setdefault("trained_betas", None)
        if isinstance(config, dict) and "_variance_type" in config:
            config = dict(config)
            config["variance_type"] = config.pop("_variance_type")
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if isinstance(made, tuple) else made
        if (error := scheduler.config.get("_prediction_error")) is not None:
            scheduler.set_prediction_error(error)
        return made

    def check_variance(self) -> None:
        """Whether the variance of the ancestral sampler is known.

        Raises:
            ValueError: `optimal`, and the network's error was not measured.
        """
        if self.variance_type == OPTIMAL_VARIANCE and self.config.get("_prediction_error") is None:
            raise UserError(
                "variance_type='optimal' needs the network's measured error: run ddpm-hf optimal_variance on the "
                "model, or call scheduler.set_prediction_error"
            )

    def set_prediction_error(self, error: Sequence[float] | Tensor) -> None:
        """Tell how far the network's predicted x_0 is off, for `variance_type="optimal"`; it is saved with the rest.

        The best variance of p(x_{t-1}|x_t) is beta_tilde_t plus the squared weight of x_0 in the posterior's mean
        times this error. For a perfect network the error is (1 - alpha_bar) / alpha_bar (1 - E||eps||^2 / d), and this
        is Theorem 1 of Bao et al. 2022 (Analytic-DPM).

        Args:
            error: `[T]`, the mean squared error of the predicted (and clipped) x_0 at every t, per pixel and in the
                [-1, 1] scale: `bits_per_dim(...).mse.mean(0)`, or `optimal_variance.prediction_error`.

        Raises:
            ValueError: Not T finite numbers from 0 on.
        """
        T = self.config.num_train_timesteps
        values = torch.as_tensor(error, dtype=torch.float64).cpu()
        if values.shape != (T,) or not values.isfinite().all() or values.min() < 0:
            raise UserError(f"the prediction error must be {T} finite numbers from 0 on, got {list(values.shape)}")
        # seven digits are more than the measurement has
        self.register_to_config(_prediction_error=[float(f"{value:.7g}") for value in values.tolist()])
        self._make_chains()

    # ------------------------------------------------------------------ state that users may change

    def register_to_config(self, **kwargs: Any) -> None:
        """Change settings, as stock's trainers do; they hold from the next call on, and are saved.

        Raises:
            ValueError: A value outside its range, or a setting that the tables were made from.
        """
        kwargs = {name: _plain_number(value) for name, value in kwargs.items()}
        if "_betas" in self.__dict__:
            for name in kwargs.keys() & _BUILT_INTO_TABLES:
                if not np.array_equal(kwargs[name], self.config[name]):
                    raise UserError(
                        f"{name} cannot change once the tables are made; make another scheduler: "
                        f"DDPMScheduler.from_config(scheduler.config, {name}=...)"
                    )
            self._check_settings({**self.config, **kwargs})
        super().register_to_config(**kwargs)
        self._internal_dict = _Config(self._internal_dict)

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
            if isinstance(config[name], bool) or not isinstance(config[name], numbers.Real):
                raise UserError(f"{name} must be a number, got {config[name]!r}")
        for name in ("clip_sample_range", "sample_max_value"):
            if not 0 < config[name] < math.inf:
                raise UserError(
                    f"{name} must be positive and finite, got {config[name]!r}; images lie in [-1, 1], and "
                    "clip_sample=False does not clip"
                )
        if not 0 <= config["dynamic_thresholding_ratio"] <= 1:
            raise UserError(
                f"dynamic_thresholding_ratio must be in [0, 1], got {config['dynamic_thresholding_ratio']!r}"
            )

    @property
    def config(self) -> Any:
        """The settings in force."""
        if not torch.compiler.is_compiling() and "_sampling_chain" in self.__dict__:  # not while it is being made
            self._follow(but="timesteps")
        return self._internal_dict

    @property
    def variance_type(self) -> str:
        """The reverse process's variance; `fixed_small` where the configuration has none, as in stock."""
        return self._internal_dict.variance_type or "fixed_small"

    @variance_type.setter
    def variance_type(self, value: str) -> None:
        self.register_to_config(variance_type=value)

    @property
    def betas(self) -> Tensor:
        """beta_t, float32 `[T]`; may be assigned."""
        return self._read("betas")

    @betas.setter
    def betas(self, value: Any) -> None:
        self._write_table("betas", value)

    @property
    def alphas(self) -> Tensor:
        """1 - beta_t, float32 `[T]`; may be assigned."""
        return self._read("alphas")

    @alphas.setter
    def alphas(self, value: Any) -> None:
        self._write_table("alphas", value)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar_t, float32 `[T]`; may be assigned."""
        return self._read("alphas_cumprod")

    @alphas_cumprod.setter
    def alphas_cumprod(self, value: Any) -> None:
        self._write_table("alphas_cumprod", value)

    @property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar_t, float64 `[T]`: what `alphas_cumprod` rounds."""
        return self._process.alpha_bar

    @property
    def timesteps(self) -> Tensor:
        """The timesteps that `step` walks through, int64 from high to low; may be assigned."""
        return self._read("timesteps")

    @timesteps.setter
    def timesteps(self, value: Any) -> None:
        self._follow(but="timesteps")
        device = value.device if isinstance(value, Tensor) else self._public["timesteps"].device
        self._use_timesteps(self._falling(value), value if isinstance(value, Tensor) else None, device)

    def _read(self, name: str) -> Tensor:
        self._follow(but=name)
        with suppress(UserError):  # else what stands there could not be repaired; its next use refuses it
            self._follow()
        return self._public[name]

    def _write_table(self, name: str, value: Any) -> None:
        self._follow(but=name)
        self._follow_tables({name: value})

    @property
    def _process(self) -> Chain:
        """The paper's chain, over all T timesteps."""
        self._follow()
        return self._whole_chain

    @property
    def _chain(self) -> Chain:
        """The chain that `step` walks, over `timesteps`."""
        self._follow()
        return self._sampling_chain

    def _follow(self, but: str = "") -> None:
        """Take over what was written in place into the public tables and timesteps since they were last looked at."""
        if torch.compiler.is_compiling():
            return
        changed = [name for name, x in self._public.items() if _version(x) != self._seen[name] and name != but]
        if not changed:
            return
        if tables := {name: self._public[name] for name in changed if name != "timesteps"}:
            self._follow_tables(tables)
        if "timesteps" in changed:
            timesteps = self._public["timesteps"]
            self._use_timesteps(self._falling(timesteps), timesteps, timesteps.device)

    def _follow_tables(self, written: dict[str, Any]) -> None:
        """Make the tables that a user wrote the process's, unless they are those in force as their dtype rounds them.

        Raises:
            ValueError: Not T numbers, betas outside (0, 1), or tables that contradict each other.
        """
        T, in_force = len(self._betas), tables_of(self._betas)
        tables = {name: _as_table(name, value, T) for name, value in written.items()}
        betas: np.ndarray | None = None
        for name, table in tables.items():
            dtype = table.dtype if table.dtype.itemsize < 4 else torch.float32
            if torch.equal(table.cpu().to(dtype), torch.from_numpy(in_force[name]).float().to(dtype)):
                continue
            found = table.double().cpu().numpy().copy()  # what is written into the table later has to be seen
            if betas is not None and not np.allclose(tables_of(betas)[name], found, rtol=1e-3, atol=1e-5):
                raise UserError(f"{' and '.join(tables)} were written to and contradict each other; write one of them")
            betas = betas_of(name, found)
            if (t := first_outside(betas, may_end_at_1=True)) is not None:
                raise UserError(
                    f"every beta must lie strictly between 0 and 1, and {name} as set gives {betas[t]:g} at t={t}"
                )
        if betas is not None:
            self._register_betas(betas)
            self._use_betas(betas)
        self._public |= tables
        self._seen |= {name: _version(table) for name, table in tables.items()}

    def _register_betas(self, betas: np.ndarray) -> None:
        """Save the betas with the rest. An error measured on another process is not this one's."""
        new: dict[str, Any] = {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
        if self._internal_dict.get("_prediction_error") is not None:
            new["_prediction_error"] = None
        # no longer defaults, or another scheduler's `from_config` would leave them out
        defaults = [name for name in self._internal_dict.get("_use_default_values", []) if name not in new]
        super().register_to_config(**new, _use_default_values=defaults)
        self._internal_dict = _Config(self._internal_dict)

    def _use_betas(self, betas: np.ndarray) -> None:
        """Make these the betas in force, float64 `[T]`, and the public tables follow."""
        self._betas = betas
        with torch.inference_mode(False):  # tensors made in inference mode do not count what is written into them
            tables = {name: torch.from_numpy(table).float() for name, table in tables_of(betas).items()}
        self._public |= tables
        self._seen |= {name: _version(table) for name, table in tables.items()}
        self._make_chains()

    def _use_timesteps(self, chosen: np.ndarray, given: Tensor | None, device: Any) -> None:
        """Walk these (checked) timesteps from now on; `given` is the tensor that holds them, if there is one."""
        with torch.inference_mode(False):
            if given is None or given.is_inference() or given.dtype != torch.int64:
                given = torch.from_numpy(chosen.copy()).to(device)
        self._public["timesteps"] = given
        self._seen["timesteps"] = _version(given)
        self._sampling_chain = self._chain_over(chosen)

    def _make_chains(self) -> None:
        self._whole_chain = self._chain_over(np.arange(len(self._betas) - 1, -1, -1))
        self._sampling_chain = self._chain_over(self._sampling_chain.timesteps)

    def _chain_over(self, timesteps: np.ndarray) -> Chain:
        error = self._internal_dict.get("_prediction_error")
        chain = Chain(self._betas, timesteps, None if error is None else np.array(error))
        chain.on(self._public["timesteps"].device, torch.float32)
        return chain

    def _falling(self, timesteps: Any) -> np.ndarray:
        """Timesteps of a user's, int64 `[K]`.

        Raises:
            ValueError: No list of whole numbers, empty, repeated, rising or outside the schedule.
        """
        if not hasattr(timesteps, "__len__") or (isinstance(timesteps, (Tensor, np.ndarray)) and not timesteps.ndim):
            raise UserError(f"timesteps must be a list of whole numbers, got {timesteps!r}")
        given = timesteps.tolist() if isinstance(timesteps, (Tensor, np.ndarray)) else timesteps
        chosen = np.array([whole_number("each of timesteps", t, or_float=True) for t in given], dtype=np.int64)
        if not len(chosen):
            raise UserError("timesteps is empty; give at least one, for example timesteps=[999, 500, 0]")
        if (np.diff(chosen) >= 0).any():
            k = int((np.diff(chosen) >= 0).argmax())
            raise UserError(
                f"timesteps must fall from high to low without repeats, but {chosen[k]} is followed by "
                f"{chosen[k + 1]}; try sorted(set(timesteps), reverse=True)"
            )
        return self._inside(chosen)

    def _inside(self, chosen: np.ndarray, hint: str = "") -> np.ndarray:
        T = len(self._betas)
        if chosen[0] >= T or chosen[-1] < 0:
            wrong = chosen[0] if chosen[0] >= T else chosen[-1]
            raise UserError(f"timestep {wrong} is outside the schedule, which counts from 0 to {T - 1}{hint}")
        return chosen

    def to_json_string(self) -> str:
        """The configuration as it is saved: stock's, changed where stock would sample nonsense from it.

        Stock reads a `learned` log-variance as a variance. Its `prediction_type` is saved with a suffix, so that stock
        refuses to sample and names it; this class takes the suffix off again. `fixed_large_log`, which is NaN in
        stock, is saved as `fixed_large`, which means the same; `optimal` as `fixed_small`, with a note for this class.
        """
        self._follow(but="timesteps")
        config = json.loads(super().to_json_string())
        if self.variance_type == "learned":
            config["prediction_type"] += _ON_DISK_LEARNED
        if self.variance_type == "fixed_large_log":
            config["variance_type"] = "fixed_large"
        if self.variance_type == OPTIMAL_VARIANCE:
            config |= {"variance_type": "fixed_small", "_variance_type": OPTIMAL_VARIANCE}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # ------------------------------------------------------------------ checks and coefficients

    def _coefficients(
        self, chain: Chain, t: Timestep, like: Tensor, as_tensors: bool = False, broadcast: bool = False
    ) -> dict[str, Any]:
        """The chain's numbers at t, to multiply tensors of `like`'s shape and working precision with.

        One t known on the host gives Python floats (no kernels), unless `as_tensors`; else `[B, 1, ..., 1]` tensors.
        With `broadcast` one image may be at many timesteps.
        A `t` that lies on an accelerator is not checked: that would wait for the device.
        """
        dtype = _working_dtype(like)
        if torch.compiler.is_compiling() or (isinstance(t, Tensor) and t.device.type != "cpu"):
            return chain.gather(torch.as_tensor(t).reshape(-1), like, dtype)
        if isinstance(t, Tensor):
            if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
                raise UserError(f"timesteps must be whole numbers, got a tensor of {t.dtype}")
            if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like)) and not (broadcast and len(like) == 1)):
                raise UserError(
                    f"timesteps must be one number, or one per image: got shape {tuple(t.shape)} "
                    f"for a batch of {len(like)}"
                )
        else:
            t = whole_number("a timestep", t)
        for value in set(t.reshape(-1).tolist() if isinstance(t, Tensor) else [t]):
            if not 0 <= value < len(self._betas):
                raise UserError(f"t={value} is outside the schedule; timesteps count from 0 to {len(self._betas) - 1}")
            if value not in chain.previous:
                raise UserError(
                    f"t={value} is not among the {len(chain.previous)} timesteps of the sampling chain; pass a value "
                    "of scheduler.timesteps, or put it there with set_timesteps(timesteps=[...])"
                )
        if as_tensors or (isinstance(t, Tensor) and t.ndim == 1):
            return chain.gather(torch.as_tensor(t).reshape(-1), like, dtype)
        return chain.row(int(t))

    # ------------------------------------------------------------------ the forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """A draw of x_t ~ q(x_t|x_0) (Eq. 4): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

        Args:
            original_samples: x_0, `[B, ...]`.
            noise: Standard normal, the shape of x_0.
            timesteps: int, 0-d or `[B]`, 0..T-1. Any of the three may be one for all, as one image at 8 timesteps.

        Returns:
            x_t in the dtype of x_0 and the noise; bf16 and fp16 are computed in float32 and rounded once.

        Raises:
            ValueError: Shapes that do not fit, a t outside the schedule.
        """
        c, x_0, noise, dtype = self._mixed("original_samples", original_samples, noise, timesteps)
        return _affine(c["sqrt_alpha_bar"], x_0, c["sqrt_one_minus_alpha_bar"], noise).to(dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022). Arguments as `add_noise`."""
        c, x_0, noise, dtype = self._mixed("sample", sample, noise, timesteps)
        return _affine(c["sqrt_alpha_bar"], noise, -c["sqrt_one_minus_alpha_bar"], x_0).to(dtype)

    def _mixed(self, name: str, x_0: Tensor, noise: Tensor, t: Timestep) -> tuple[dict[str, Any], Tensor, Tensor, Any]:
        """Coefficients for images and noise, both in working precision, and the dtype that their mixture has."""
        if x_0.shape != noise.shape and (
            not x_0.ndim or x_0.shape[1:] != noise.shape[1:] or 1 not in (len(x_0), len(noise))
        ):
            _check_same_shape(name, x_0, "noise", noise)
        dtype = torch.promote_types(x_0.dtype, noise.dtype)
        working = torch.promote_types(_working_dtype(x_0), _working_dtype(noise))
        x_0, noise = x_0.to(working), noise.to(working)
        like = x_0 if len(x_0) >= len(noise) else noise
        return self._coefficients(self._process, t, like, broadcast=True), x_0, noise, dtype

    def q_mean_variance(self, x_0: Tensor, t: Timestep) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t|x_0) (Eq. 4).

        Args:
            x_0: `[B, ...]`.
            t: int, 0-d or `[B]`, 0..T-1.

        Returns:
            Three tensors that broadcast with `x_0`; the mean has its shape.

        Raises:
            ValueError: A t outside the schedule, or a number of timesteps that does not fit.
        """
        c = self._coefficients(self._process, t, x_0, as_tensors=True)
        variance = c["sqrt_one_minus_alpha_bar"].square()
        return c["sqrt_alpha_bar"] * _working(x_0), variance, c["log_one_minus_alpha_bar"]

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep) -> tuple[Tensor, Tensor, Tensor]:
        """Mean mu-tilde, variance beta-tilde and log-variance of q(x_{t-1}|x_t,x_0) (Eqs. 6, 7), over all T timesteps.

        At t = 0 the variance is 0 and the log-variance that of t = 1, as in the official code.

        Args:
            x_0, x_t: `[B, ...]`, the same shape.
            t: int, 0-d or `[B]`, 0..T-1.

        Returns:
            Three tensors that broadcast with `x_0`; the mean has its shape.

        Raises:
            ValueError: Shapes that do not fit, a t outside the schedule.
        """
        _check_same_shape("x_0", x_0, "x_t", x_t)
        c = self._coefficients(self._process, t, x_0, as_tensors=True)
        mean = _affine(c["mean_from_x_0"], _working(x_0), c["mean_from_x_t"], _working(x_t))
        return mean, c["beta_tilde"], c["log_beta_tilde_clipped"]

    def get_target(self, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """What the network is asked to predict for `x_t = add_noise(x_0, noise, t)`: the shape of `x_0`.

        `noise`, `x_0`, v, or the posterior's mean mu-tilde, by `prediction_type`. Arguments as `add_noise`; t is
        checked where it is needed.
        """
        _check_same_shape("x_0", x_0, "noise", noise)
        kind = self._prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x_0
        if kind == "v_prediction":
            return self.get_velocity(x_0, noise, t)
        return self.q_posterior(x_0, self.add_noise(x_0, noise, t), t)[0]

    # ------------------------------------------------------------------ the reverse process

    @property
    def _prediction_type(self) -> str:
        kind = self._internal_dict.prediction_type
        if kind not in PREDICTION_TYPES:  # a configuration put there whole
            check_choice("prediction_type", kind, PREDICTION_TYPES)
        return kind

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as (prediction, raw variance or `None`), each the shape of `x_t`.

        Raises:
            ValueError: The number of channels does not fit the `variance_type`, or other dimensions differ.
        """
        if x_t.ndim < 2:
            raise UserError(f"a sample must have the shape [B, C, ...], got {tuple(x_t.shape)}")
        channels, learned = x_t.shape[1], self.variance_type in LEARNED_VARIANCES
        wanted = (x_t.shape[0], channels * (2 if learned else 1), *x_t.shape[2:])
        if tuple(model_output.shape) != wanted:
            hint = ""
            if learned and model_output.shape == x_t.shape:
                hint = (
                    f"; variance_type={self.variance_type!r} needs a network with out_channels={2 * channels}, "
                    "use 'fixed_small' or 'fixed_large' with this one"
                )
            elif not learned and model_output.shape[1:2] == (2 * channels,):
                hint = "; a network with twice the channels needs variance_type='learned' or 'learned_range'"
            raise UserError(
                f"model_output must have shape {wanted} for a sample of shape {tuple(x_t.shape)}, "
                f"got {tuple(model_output.shape)}{hint}"
            )
        if learned:
            prediction, raw_variance = model_output.split(channels, dim=1)
            return prediction, raw_variance
        return model_output, None

    def _reverse(
        self, chain: Chain, c: dict[str, Any], t: Timestep, output: Tensor, x_t: Tensor, clip: bool
    ) -> tuple[Tensor, Any, Tensor]:
        """Mean and log-variance of p(x_{t-1}|x_t), and the predicted x_0, in the working precision of `x_t`."""
        dtype = _working_dtype(x_t)
        output, raw_variance = self.split_output(output, x_t)
        output, x_t = output.to(dtype), x_t.to(dtype)
        kind = self._prediction_type
        undefined = chain.undefined.get(kind)
        if undefined and not torch.compiler.is_compiling():
            for value in undefined.intersection(torch.as_tensor(t).reshape(-1).tolist()):
                raise UserError(
                    f"alpha_bar vanishes at t={value}, where {kind!r} says nothing about x_0; use prediction_type="
                    "'v_prediction' or 'sample' with this schedule, or timesteps that leave it out"
                )

        # Eq. 15, or its like for the other predictions
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

        # Eq. 7 at the predicted x_0; a network that predicts the mean itself is taken at its word over the whole
        # chain, as in the official code, which clips x_0 for display only; over fewer steps it comes from its x_0
        if kind == "posterior_mean" and chain.is_whole:
            mean = output
        else:
            mean = _affine(c["mean_from_x_0"], x_0, c["mean_from_x_t"], x_t)

        if raw_variance is None:
            if self.variance_type == OPTIMAL_VARIANCE:
                self.check_variance()
                return mean, c["log_optimal"], x_0
            # Section 3.2: sigma_t^2 = beta_tilde_t or beta_t
            small = self.variance_type in ("fixed_small", "fixed_small_log")
            return mean, c["log_beta_tilde_clipped" if small else "log_beta_clipped"], x_0
        raw_variance = raw_variance.to(dtype)
        if self.variance_type == "learned":
            return mean, raw_variance, x_0
        # Nichol & Dhariwal 2021, Eq. 15: between the two fixed ones in log space
        share = (raw_variance + 1.0) / 2.0
        return mean, share * c["log_beta"] + (1.0 - share) * c["log_beta_tilde_clipped"], x_0

    def p_mean_variance(
        self, model_output: Tensor, t: Timestep, x_t: Tensor, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The model's p(x_{t-1}|x_t) (Eq. 1) over all T timesteps, whatever `set_timesteps` chose for sampling.

        Args:
            model_output: `[B, C, ...]`, or `[B, 2C, ...]` where the variance is learned.
            t: int, 0-d or `[B]`, 0..T-1.
            x_t: `[B, C, ...]`.
            clip_denoised: Clip the predicted x_0 to `clip_sample_range` (or threshold it), as sampling and the
                likelihood do; the training bound does not.

        Returns:
            `(mean, variance, log_variance, pred_original_sample)`, each the shape of `x_t`. At t = 0 the log-variance
            of the fixed types is that of beta_tilde at t = 1, as in the official code, and the variance goes with it.

        Raises:
            ValueError: Shapes that do not fit, a t outside the schedule.
        """
        c = self._coefficients(self._process, t, x_t, as_tensors=True)
        mean, log_variance, x_0 = self._reverse(self._process, c, t, model_output, x_t, clip_denoised)
        log_variance = log_variance.expand_as(mean)
        return mean, log_variance.exp(), log_variance, x_0

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of Algorithm 2: x_t to the chain's next timestep (the data, where there is none).

        With fewer timesteps than T (`set_timesteps`), mean and variance are those of the subsequence's own posterior.

        Args:
            model_output: `[B, C, ...]`, or `[B, 2C, ...]` where the variance is learned.
            timestep: int, 0-d or `[B]` (one per image), each among `timesteps`.
            sample: x_t, `[B, C, ...]`.
            generator: One generator, or exactly B of them, or `SeededNoise` of B seeds. Generators draw in stock's
                order; nothing is drawn where a single `timestep` is the last one.
            return_dict: `False` gives a tuple.

        Returns:
            `prev_sample` and `pred_original_sample`, the shape and dtype of `sample` (computed in float32 at least).

        Raises:
            ValueError: Shapes that do not fit, a t that is not among the timesteps, a wrong number of generators.
        """
        if isinstance(generator, (list, tuple)):
            generator = list(generator)  # randn_tensor knows lists only
            if len(generator) != len(sample):
                raise UserError(
                    f"got {len(generator)} generators for a batch of {len(sample)}; pass one generator, or one per "
                    "image"
                )
        chain = self._chain
        c = self._coefficients(chain, timestep, sample)
        clip = self._internal_dict.clip_sample or self._internal_dict.thresholding
        mean, log_variance, x_0 = self._reverse(chain, c, timestep, model_output, sample, clip)

        if self.variance_type == OPTIMAL_VARIANCE:
            log_variance = c["log_optimal_noise"]
        has_previous = c["has_previous"]
        if isinstance(has_previous, Tensor) or has_previous:
            noise = standard_normal(sample.shape, generator, sample.device, sample.dtype).to(mean.dtype)
            if isinstance(log_variance, Tensor):
                mean = torch.addcmul(mean, torch.exp(0.5 * log_variance) * has_previous, noise)
            else:
                mean = torch.add(mean, noise, alpha=math.exp(0.5 * log_variance))

        prev_sample, x_0 = mean.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    # ------------------------------------------------------------------ the sampling chain

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps that `step` walks through, from high to low; the last one steps to the data.

        `leading` spacing takes floor(k T / K) for k = 0..K-1, which is stock's choice where K divides T; elsewhere
        stock rounds T / K down first and starts pure noise in the middle of the chain.

        Args:
            num_inference_steps: K, 1..T, spaced as `timestep_spacing` says.
            device: Where to put `timesteps`.
            timesteps: Falling timesteps of your own, instead of `num_inference_steps`.

        Raises:
            ValueError: None or both given, K outside 1..T, timesteps empty, repeated, rising or outside the schedule.
        """
        self._follow(but="timesteps")
        config, T = self._internal_dict, len(self._betas)
        if (num_inference_steps is None) == (timesteps is None):
            raise UserError("pass either num_inference_steps or timesteps, and not both")
        if timesteps is not None:
            chosen = self._falling(timesteps)
        else:
            K = whole_number("num_inference_steps", num_inference_steps, or_float=True)
            if not 1 <= K <= T:
                raise UserError(f"num_inference_steps must be between 1 and the {T} steps of the chain, got {K}")
            spacing, offset = config.timestep_spacing, config.steps_offset
            if spacing == "linspace":
                chosen = np.linspace(0, T - 1, K).round().astype(np.int64)[::-1]
            elif spacing == "leading":
                chosen = (np.arange(K) * T // K)[::-1] + offset
            else:
                chosen = np.round(T - np.arange(K) * (T / K)).astype(np.int64) - 1
            self._inside(chosen, f"; steps_offset={offset} leads beyond it, use 0" if offset else "")

        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self._use_timesteps(chosen, None, device)
        if self.variance_type in ("fixed_large", "fixed_large_log") and len(chosen) < T:
            self._warn_of_fixed_large(len(chosen))

    def _warn_of_fixed_large(self, steps: int) -> None:
        """Once, as repositories on the Hub carry this variance: over a few long steps it leaves the images noisy."""
        if not DDPMScheduler._warned_of_fixed_large:
            DDPMScheduler._warned_of_fixed_large = True
            logger.warning(
                f"variance_type={self.variance_type!r} over {steps} steps leaves noise in the images; better: "
                "variance_type='optimal' (after ddpm-hf optimal_variance) or 'fixed_small', or the ddim sampler"
            )

    def previous_timestep(self, timestep: Timestep) -> Timestep:
        """The chain's next timestep after (below) `timestep`, or -1 where that is the data.

        Returns:
            A 0-d tensor as in stock; `timestep - 1`, of its own type, where the chain is that of a new scheduler.

        Raises:
            ValueError: `timestep` is not among `timesteps`.
        """
        chain, t = self._chain, whole_number("timestep", timestep)
        if t not in chain.previous:
            raise UserError(f"t={t} is not among the {len(chain.previous)} timesteps of the sampling chain")
        if chain.is_whole and self.num_inference_steps is None:
            return timestep - 1
        return self._public["timesteps"].new_tensor(chain.previous[t])


def _working_dtype(x: Tensor) -> torch.dtype:
    """The precision to compute in: float64 for float64, else float32."""
    if not x.is_floating_point():
        raise UserError(f"expected floating-point images in [-1, 1], got {x.dtype}; for uint8 use x / 127.5 - 1")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _working(x: Tensor) -> Tensor:
    return x.to(_working_dtype(x))


def _check_same_shape(name_1: str, x_1: Tensor, name_2: str, x_2: Tensor) -> None:
    if x_1.shape != x_2.shape:
        raise UserError(
            f"{name_1} and {name_2} must have the same shape, got {tuple(x_1.shape)} and {tuple(x_2.shape)}"
        )


def whole_number(name: str, value: Any, or_float: bool = False) -> int:
    """The value as an int; with `or_float` also 10.0, which stock takes.

    Raises:
        ValueError: It is no whole number.
    """
    try:
        if or_float and isinstance(value, (float, np.floating)) and float(value).is_integer():
            return int(value)
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{name} must be a whole number, got {value!r}")
