"""The tables and timesteps of a process, which users may assign or write into in place; what follows, follows.

The coefficients are float64 (`noise_schedule.Chain`); what users see is float32, as in stock diffusers.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from ..utils.errors import UserError
from .noise_schedule import Chain, betas_of, check_betas, tables_of


class Settings(FrozenDict):
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


def _followed(name: str, meaning: str) -> property:
    """A tensor that users may assign or write into; what is computed from it follows (`ProcessTables._follow`)."""

    def read(self: ProcessTables) -> Tensor:
        self._follow(but=name)
        with suppress(UserError):  # else what stands there could not be repaired; its next use refuses it
            self._follow()
        return self._public[name]

    def write(self: ProcessTables, value: Any) -> None:
        self._follow(but=name)
        self._take_over({name: value})

    return property(read, write, doc=f"{meaning}; may be assigned.")


class ProcessTables:
    """The state of `DDPMScheduler` beside its configuration: betas, timesteps, and the chains made from them."""

    _internal_dict: Any  # the configuration
    betas = _followed("betas", "beta_t, float32 `[T]`")
    alphas = _followed("alphas", "1 - beta_t, float32 `[T]`")
    alphas_cumprod = _followed("alphas_cumprod", "alpha_bar_t, float32 `[T]`")
    timesteps = _followed("timesteps", "The timesteps that `step` goes through, int64 from high to low")

    def _begin(self, betas: np.ndarray) -> None:
        """Start with these betas, float64 `[T]`, and all timesteps."""
        self._betas = betas
        self._public: dict[str, Tensor] = {}  # what users see and may write into
        self._seen: dict[str, int] = {}  # how often each of them had been written into when it was last looked at
        self._use_timesteps(np.arange(len(betas) - 1, -1, -1))
        self._use_betas(betas)

    @property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar_t, float64 `[T]`: what `alphas_cumprod` rounds."""
        return self._process.alpha_bar

    @property
    def _process(self) -> Chain:  # the paper's chain, over all T timesteps
        self._follow()
        return self._whole_chain

    @property
    def _chain(self) -> Chain:  # the one that `step` goes down, over `timesteps`
        self._follow()
        return self._sampling_chain

    def _follow(self, but: str = "") -> None:
        """Take over what was written in place into the public tables and timesteps since they were last looked at."""
        if not torch.compiler.is_compiling():
            public = self._public.items()
            self._take_over({name: x for name, x in public if _version(x) != self._seen[name] and name != but})

    def _take_over(self, written: dict[str, Any]) -> None:
        """Make what a user wrote the process's tables and timesteps; a `ValueError` if they do not make sense."""
        timesteps, betas = written.pop("timesteps", None), None
        tables = {name: _as_table(name, value, len(self._betas)) for name, value in written.items()}
        for name, table in tables.items():
            dtype = table.dtype if table.dtype.itemsize < 4 else torch.float32
            in_force = torch.from_numpy(tables_of(self._betas)[name]).float().to(dtype)
            if torch.equal(table.cpu().to(dtype), in_force):
                continue  # the table in force, as its dtype rounds it
            found = table.double().cpu().numpy().copy()  # what is written into the table later has to be seen
            if betas is not None and not np.allclose(tables_of(betas)[name], found, rtol=1e-3, atol=1e-5):
                raise UserError(f"{' and '.join(tables)} were written to and contradict each other; write one of them")
            betas = betas_of(name, found)
            check_betas(betas, may_end_at_1=True)
        if betas is not None:
            # an error measured on another process is not this one's
            measured = self._internal_dict.get("_prediction_error") is not None
            self._save_betas(betas, rescale_betas_zero_snr=False, **({"_prediction_error": None} if measured else {}))
            self._use_betas(betas)
        for name, table in tables.items():
            self._publish(name, table)
        if timesteps is not None:
            self._use_timesteps(self._falling(timesteps), timesteps, self._public["timesteps"].device)

    def _save_betas(self, betas: np.ndarray, **settings: Any) -> None:
        """Save betas in the configuration, no longer as defaults, which another `from_config` would leave out."""
        settings["trained_betas"] = betas.tolist()  # a list, as JSON knows neither arrays nor tensors
        defaults = [name for name in self._internal_dict.get("_use_default_values", []) if name not in settings]
        super().register_to_config(**settings, _use_default_values=defaults)  # type: ignore[misc]
        self._internal_dict = Settings(self._internal_dict)

    def _use_betas(self, betas: np.ndarray) -> None:
        """Make these the betas in force, float64 `[T]`, and the public tables follow."""
        self._betas = betas
        for name, table in tables_of(betas).items():
            self._publish(name, torch.from_numpy(table).float())
        self._make_chains()

    def _use_timesteps(self, chosen: np.ndarray, given: Any = None, device: Any = None) -> None:
        """Sample over these (checked) timesteps from now on; `given` holds them, if they came as a tensor."""
        if not isinstance(given, Tensor) or given.dtype != torch.int64:
            device = given.device if isinstance(given, Tensor) else device
            given = torch.from_numpy(chosen.copy()).to(device)
        self._publish("timesteps", given)
        self._sampling_chain = self._chain_over(chosen)

    def _publish(self, name: str, x: Tensor) -> None:
        """Show users this tensor, or a copy where it is of inference mode, which does not count what is written."""
        with torch.inference_mode(False):
            self._public[name] = x = x.clone() if x.is_inference() else x
        self._seen[name] = _version(x)

    def _make_chains(self) -> None:
        self._whole_chain = self._chain_over(np.arange(len(self._betas) - 1, -1, -1))
        self._sampling_chain = self._chain_over(self._sampling_chain.timesteps)

    def _chain_over(self, timesteps: np.ndarray) -> Chain:
        error = self._internal_dict.get("_prediction_error")
        chain = Chain(self._betas, timesteps, None if error is None else np.array(error))
        chain.on(self._public["timesteps"].device, torch.float32)
        return chain

    def _falling(self, timesteps: Any, hint: str = "") -> np.ndarray:
        """Return timesteps as int64 `[K]`, checked."""
        if isinstance(timesteps, (Tensor, np.ndarray)):
            timesteps = timesteps.tolist()
        if not hasattr(timesteps, "__len__"):
            raise UserError(f"timesteps must be a list of whole numbers, got {timesteps!r}")
        chosen = np.array([whole_number("each of timesteps", t, or_float=True) for t in timesteps], dtype=np.int64)
        if not len(chosen):
            raise UserError("timesteps is empty; give at least one, for example timesteps=[999, 500, 0]")
        if (rises := np.diff(chosen) >= 0).any():
            k = int(rises.argmax())
            advice = "try sorted(set(timesteps), reverse=True)"
            raise UserError(f"timesteps must fall, but {chosen[k]} is followed by {chosen[k + 1]}; {advice}")
        for t in chosen[[0, -1]]:
            if not 0 <= t < (T := len(self._betas)):
                raise UserError(f"timestep {t} is outside the schedule, which counts from 0 to {T - 1}{hint}")
        return chosen


def whole_number(name: str, value: Any, or_float: bool = False) -> int:
    """Return the value as an int, or raise a `ValueError`; `or_float` takes 10.0 as well, as stock does."""
    try:
        if or_float and isinstance(value, (float, np.floating)) and float(value).is_integer():
            return int(value)
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{name} must be a whole number, got {value!r}")


def number_of_steps(value: Any, T: int) -> int:
    """Return a number of sampler steps, or raise a `ValueError` where it is not a whole number from 1 to T."""
    if not 1 <= (steps := whole_number("--num_inference_steps", value, or_float=True)) <= T:
        raise UserError(f"--num_inference_steps must be between 1 and the {T} steps of the chain, got {steps}")
    return steps


def spaced_timesteps(T: int, K: int, spacing: str, offset: int = 0) -> np.ndarray:
    """Return K of the timesteps 0..T-1, falling, int64 `[K]`, by a `timestep_spacing` (Lin et al. 2023, Table 2)."""
    if spacing == "linspace":
        chosen: Any = np.linspace(0, T - 1, K).round()[::-1]
    elif spacing == "leading":
        # floor(k T / K), stock's where K divides T; elsewhere stock rounds T / K down first, and starts pure noise in
        # the middle of the chain
        chosen = (np.arange(K) * T // K)[::-1] + offset
    else:
        chosen = np.round(T - np.arange(K) * (T / K)) - 1
    return chosen.astype(np.int64)


def _version(x: Tensor) -> int:
    """Return how often a tensor was written to in place; 0 for those of inference mode, which do not count it."""
    return 0 if x.is_inference() else x._version


def _as_table(name: str, value: Any, T: int) -> Tensor:
    """Return a user's one number per timestep as a floating-point tensor, which shares the memory of a given one."""
    try:
        table = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float32))
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a tensor of numbers, got {value!r}") from None
    if table.shape != (T,) or not table.is_floating_point():
        got = f"{table.dtype} of shape {list(table.shape)}"
        raise UserError(f"{name} must be {T} numbers, one per timestep, got {got}")
    return table.detach() if table.requires_grad else table
