"""Post-hoc EMA (Karras et al. 2024, arXiv 2312.02696, Section 3, appendix C): any averaging length, after training.

A run keeps two power-function averages of its weights, and snapshots of both in float16 (`ema/update-N.safetensors`
after updates 2^(k / 3), of which the newest few are kept, and after the newest checkpoint's). An average of another
length is the linear combination of these that comes closest to it.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.unet_2d import UNet2DModel
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..pipelines.schedulers import make_scheduler
from ..utils.errors import UserError, first_line
from ..utils.files import remove_leftovers, write_whole

FOLDER = "ema"
TRACKED = (0.05, 0.10)  # the lengths sigma_rel that a run keeps, as in the paper
LONGEST = 12**-0.5  # sigma_rel of gamma = 0: the mean of all updates
_PER_DOUBLING = 3  # snapshots; when they are due does not depend on the run's last update, which may change
# What the rounding of snapshots adds to the inner products, in units of t: without it, two snapshots of nearly the
# same update get large coefficients of opposite signs.
_ROUNDING = 1e-6
LARGEST_ERROR = 0.1  # of a reconstruction, as `coefficients` predicts it

# ------------------------------------------------------------------ the mathematics, in float64

Profile = tuple[float, float]  # sigma_rel, and the update t after which the average was, or would have been, taken


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """Return the exponent gamma >= 0 of the power function whose relative width is `sigma_rel`, in [1e-6, 12^-1/2].

    The profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] has the standard deviation sigma_rel t:
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic equation in gamma. Raises UserError outside.
    """
    if not 1e-6 <= sigma_rel <= LONGEST:
        raise UserError(
            f"--sigma_rel must be above 1e-6 and at most {LONGEST:.4f} (the mean of all), got {sigma_rel:g}"
        )
    s = sigma_rel**-2.0  # (gamma + 2)^2 (gamma + 3) - s (gamma + 1) = 0
    return max(0.0, float(np.polynomial.Polynomial([12 - s, 16 - s, 7, 1]).roots().real.max()))


def fraction(sigma_rel: float, update: int) -> float:
    """Return 1 - beta(t) for update t = 1, 2, ...: how far the average moves towards the weights.

    beta(t) = (1 - 1/t)^(gamma + 1), so the first update replaces the average.
    """
    return 1.0 - (1.0 - 1.0 / update) ** (gamma_of(sigma_rel) + 1.0)


def inner_product(a: Profile, b: Profile) -> float:
    """Return the integral of (1 - C_a(tau)) (1 - C_b(tau)) over tau >= 0, where C integrates a profile from 0.

    C(tau) = min(tau / t, 1)^g with g = gamma + 1. With m = min(t_a, t_b) and c = C(m), the integral is
    m (1 - c_a / (g_a + 1) - c_b / (g_b + 1) + c_a c_b / (g_a + g_b + 1)).
    """
    m = min(a[1], b[1])
    (g_a, c_a), (g_b, c_b) = ((g := gamma_of(sigma_rel) + 1, (m / t) ** g) for sigma_rel, t in (a, b))
    return m * (1 - c_a / (g_a + 1) - c_b / (g_b + 1) + c_a * c_b / (g_a + g_b + 1))


def coefficients(known: list[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Return the x for which sum_i x_i average_i is closest to the wanted average, and the error to expect.

    With sum_i x_i = 1, which keeps weights that do not change, the error is the integral of E d theta with
    E = sum_i x_i C_i - C. For weights that walk at random its square is as the integral of E^2, of which this is the
    least. (The paper's least squares of sum_i x_i p_i - p do so for weights that are noise around a mean; measured in
    training, their errors were two to three times as large.) It is relative to the distance between the wanted average
    and the weights at its end, the integral of C d theta.
    """
    end = wanted[1]
    profiles = [(sigma_rel, update / end) for sigma_rel, update in [*known, wanted]]
    products = np.array([[inner_product(p, q) for q in profiles] for p in profiles])
    A, b = products + _ROUNDING * np.eye(len(products)), np.append(products[:-1, -1], 1.0)
    A[-1], A[:, -1], A[-1, -1] = 1.0, 1.0, 0.0  # [[A, 1], [1, 0]] [x, lambda] = [b, 1]
    x = np.linalg.solve(A, b)[:-1]
    difference = np.append(x / x.sum(), -1.0)
    square = max(0.0, difference @ products @ difference)
    return difference[:-1], math.sqrt(square * (2 * gamma_of(wanted[0]) + 3))  # int C^2 d tau = t / (2 gamma + 3)


def possible_lengths(known: list[Profile], update: int, lengths: Iterable[float]) -> list[float]:
    """Return which lengths averages that end after `update` can have."""
    return [length for length in lengths if coefficients(known, (length, update))[1] <= LARGEST_ERROR]


def move_averages(averages: list[Tensor], weights: list[Tensor], step: Tensor) -> None:
    """Move averages towards weights by the fraction `step`, a 0-d tensor that a CUDA graph can read."""
    difference = torch._foreach_sub(averages, weights)
    torch._foreach_mul_(difference, step)
    torch._foreach_sub_(averages, difference)


class PowerAverages:
    """The power-function averages of a network in training: beside it, float32, twice its weights."""

    def __init__(self, unet: nn.Module):
        self.unet = unet
        self.averages = {length: [torch.zeros_like(w) for w in unet.parameters()] for length in TRACKED}
        self._steps = {length: torch.zeros((), device=of[0].device) for length, of in self.averages.items()}

    def set_update(self, update: int) -> None:
        """Set the coefficients of update t = 1, 2, ..., before it is made."""
        for length, step in self._steps.items():
            step.fill_(fraction(length, update))

    @torch.no_grad()
    def average(self) -> None:
        """Move the averages towards the weights."""
        for length, averages in self.averages.items():
            move_averages(averages, list(self.unet.parameters()), self._steps[length])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, whose place in memory stays, as `<sigma_rel>/<name of the weight>`."""
        names = [f"{length}/{name}" for length in self.averages for name, _ in self.unet.named_parameters()]
        return dict(zip(names, itertools.chain(*self.averages.values()), strict=True))

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, average in self.state_dict().items():
            average.copy_(tensors[name])


def is_due(update: int) -> bool:
    """Return whether a snapshot is made after an update whatever else happens: 2^(k / 3), rounded."""
    return round(2 ** (round(math.log2(update) * _PER_DOUBLING) / _PER_DOUBLING)) == update


def list_snapshots(run: Path) -> dict[int, Path]:
    """Return a run's snapshots by their update, oldest first."""
    found = {path: re.fullmatch(r"update-(\d+)", path.stem) for path in (run / FOLDER).glob("*.safetensors")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def save_snapshot(run: Path, update: int, averages: dict[str, Tensor], config: dict[str, Any], keep: int) -> None:
    """Write the averages after an update, with the `config` of unet and scheduler; keep the `keep` newest due."""
    half = {name: average.to("cpu", torch.float16).contiguous() for name, average in averages.items()}
    path = run / FOLDER / f"update-{update}.safetensors"
    # One entry: safetensors writes several in any order, and the same snapshot is to be the same file.
    try:
        write_whole(path, lambda partial: save_file(half, partial, {"config": json.dumps(config, sort_keys=True)}))
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise OSError(f"cannot write {path}: {error}; checkpoints are intact") from error
    others = {t: old for t, old in list_snapshots(run).items() if t != update}
    kept = sorted((t for t in others if t < update and is_due(t)), reverse=True)[: keep - 1]
    for t in others.keys() - kept:
        others[t].unlink()


def discard_snapshots(run: Path, after: int) -> None:
    """Remove the snapshots of later updates, which a resumed run makes again, and what killed writes have left."""
    remove_leftovers(run / FOLDER)
    for update, path in list_snapshots(run).items():
        if update > after:
            path.unlink()


class Snapshots:
    """A run's snapshots, from which averages of other lengths are made, or raise UserError: there are none."""

    def __init__(self, run: Path):
        self.run, self.files = run, list_snapshots(run)
        if not self.files:
            why = "it is no run's folder, or was trained with --posthoc_ema false, with FSDP, or by version 0.1.0"
            raise UserError(f"{str(run)!r} has no snapshots for post-hoc EMA ({FOLDER}/update-*.safetensors): {why}")
        self.last = max(self.files)
        self.known: list[Profile] = [(length, update) for update in self.files for length in TRACKED]

    def check(self, sigma_rel: float, update: int) -> tuple[np.ndarray, float]:
        """Return `coefficients` of an average that ends after `update`, or raise UserError with what is possible."""
        if not 0 < update <= self.last:
            raise UserError(f"--step {update} is not an update up to {self.last}, of the newest snapshot")
        x, error = coefficients(self.known, (sigma_rel, update))
        if error > LARGEST_ERROR:
            possible = possible_lengths(self.known, update, [i / 200 for i in range(1, int(200 * LONGEST) + 1)])
            span = f"{possible[0]:g} to {possible[-1]:g}" if possible else "none"
            of = f"after update {update} from the snapshots of {', '.join(map(str, self.files))}"
            wrong = f"about {error:.0%} of the averaging would be wrong"
            possible_with = f"possible with at most {LARGEST_ERROR:.0%}: {span}"
            raise UserError(f"--sigma_rel {sigma_rel:g} cannot be had {of}: {wrong}; {possible_with}")
        return x, error

    def pipeline(self, sigma_rel: float, update: int) -> DDPMPipeline:
        """Return the model of length `sigma_rel` that ends after `update`; UserError: snapshots damaged or too few."""
        x, _ = self.check(sigma_rel, update)
        total: dict[str, Tensor] = {}
        for t, path in self.files.items():
            try:
                with safe_open(path, "pt") as file:
                    config = json.loads(file.metadata()["config"])
                    for key in file.keys():  # noqa: SIM118 (it is no dict)
                        length, _, name = key.partition("/")
                        value = file.get_tensor(key).double() * x[self.known.index((float(length), t))]
                        total[name] = total.get(name, 0.0) + value
            except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
                raise UserError(f"the snapshot {str(path)!r} is damaged: {first_line(error)}") from None
        unet = UNet2DModel(**config["unet"])
        unet.load_state_dict({**dict(unet.named_buffers()), **{name: value.float() for name, value in total.items()}})
        return DDPMPipeline(unet.eval(), make_scheduler(config["unet"], config["scheduler"]))
