"""Squared distances between features: bounded by products of matrices, computed by differences where that decides.

A product gives all distances of 50,000 images in minutes, but is off by rounding: it says which images can be the
nearest ones, or inside of a ball, and the few that it cannot tell apart are computed again in float64, where a copy is
at distance 0. So products may be in float32, and the numbers are those of float64 throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.progress import in_parts

ROWS = 512  # whose distances are in memory at a time: 512 x 50,000 in float32 take 0.1 GB
_SPARE = 4  # so many images more than asked for are computed by differences


@dataclass(frozen=True)
class Points:
    """Features `[N, D]` about an origin in the middle, where distances are the same and lose fewer digits."""

    values: Tensor  # [N, D], float32 or float64
    norms: Tensor  # [N], squared

    @classmethod
    def about(cls, origin: Tensor, features: Tensor, dtype: torch.dtype) -> Points:
        """Move `features` `[N, D]` so that `origin` `[D]` is at 0."""
        values = features.to(dtype) - origin.to(dtype)
        return cls(values, torch.cat([part.square().sum(1) for part in values.split(ROWS)]))

    def __getitem__(self, rows: Tensor | slice) -> Points:
        return Points(self.values[rows], self.norms[rows])

    @property
    def _rounding(self) -> tuple[float, float]:
        # A sum of D products is off by at most D eps / 2 of the sum of their sizes, each of the norms too; the rest is
        # what the shift and the sums of sums lose. The second one is of numbers that are too small for the format.
        size, info = self.values.shape[1], torch.finfo(self.values.dtype)
        return (size + 16) * info.eps, (size + 16) * info.tiny

    def at_least(self, others: Points) -> Tensor:
        """Return lower bounds of the squared distances, `[N, M]`."""
        share, least = self._rounding
        bounds = self.values @ others.values.T
        bounds.mul_(-2).add_((1 - share) * others.norms - least)
        return bounds.add_((1 - share) * self.norms[:, None])

    def slack(self, others: Points) -> Tensor:
        """Return by how much the distances are larger than these bounds at most, `[N, M]`."""
        share, least = self._rounding
        return 2 * share * (self.norms[:, None] + others.norms) + 2 * least


def checked(what: str, at_least: int, *sets: Tensor) -> list[Tensor]:
    """Return sets of features, `[at least so many, D]`, as they are."""
    for features in sets:
        if features.ndim != 2:
            raise UserError(f"{what} takes features [N, D], got shape {tuple(features.shape)}")
        if len(features) < at_least:
            raise UserError(f"{what} needs at least {at_least} images, got {len(features)}")
        if features.numel() and not all(extreme.isfinite() for extreme in features.aminmax()):  # NaN is both of them
            raise UserError(f"{what} got features that are not finite numbers")
    check_same_size(sets[0], sets[-1])
    return list(sets)


def check_same_size(a: Tensor, b: Tensor) -> None:
    """Raise a UserError for features `[..., D]` of two sizes."""
    if a.shape[-1] != b.shape[-1]:
        sizes = f"{a.shape[-1]} and {b.shape[-1]}"
        raise UserError(f"the features of the two sets differ in size, {sizes}: they are of different extractors")


def centre(features: Tensor) -> Tensor:
    """Return the mean of `features` `[N, D]` in float64, `[D]`."""
    total = features.new_zeros(features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):
        total += part.double().sum(0)
    return total / len(features)


def precisions(*sets: Tensor) -> list[torch.dtype]:
    """Return in which precisions products are worth computing, one after the other."""
    # Not in TF32 or bfloat16. PyTorch's older getter raises where somebody has set this setting.
    backend = torch.backends.cuda if sets[0].is_cuda else torch.backends.mkldnn
    exact = backend.matmul.fp32_precision in ("none", "ieee")
    small = all(x.dtype != torch.float64 and max(-float(x.min()), float(x.max())) < 1e15 for x in sets)
    return [torch.float32, torch.float64] if exact and small else [torch.float64]


def nearest_neighbours(queries: Tensor, candidates: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the squared distances (float64, ascending) and indices `[N, k]` of each query's nearest `candidates`."""
    queries, candidates = checked("neighbours", 1, queries, candidates)
    checked("neighbours", k, candidates)
    return _search(queries, candidates, k, min(k + _SPARE, len(candidates)), own=False)


def nearest_others(features: Tensor, k: int) -> Tensor:
    """Return the squared distances of each row of `features` to its k nearest other ones, `[N, k]`, ascending."""
    return _search(features, features, k, min(k + _SPARE, len(features) - 1), own=True)[0]


def _search(queries: Tensor, candidates: Tensor, k: int, m: int, own: bool) -> tuple[Tensor, Tensor]:
    """Find the k nearest among the m of the least bounds; `own`: both are the same, no row is its own neighbour."""
    left = torch.arange(len(queries), device=queries.device)
    distances = queries.new_empty((len(queries), k), dtype=torch.float64)
    indices = left.new_empty((len(queries), k))
    origin = centre(candidates)
    for dtype in precisions(queries, candidates):
        cloud = Points.about(origin, candidates, dtype)
        if own and len(left) == len(queries):
            bounds, index = _all_pairs(cloud, m)
        elif own:
            bounds, index = _each(cloud[left], cloud, m, left)
        else:
            bounds, index = _each(Points.about(origin, queries[left], dtype), cloud, m)
        index = index.sort(dim=1).values  # of two at the same distance the first one
        found = _by_differences(queries, left, candidates, index)
        found, order = found.sort(dim=1, stable=True)
        distances[left], indices[left] = found[:, :k], index.gather(1, order)[:, :k]
        if m >= len(candidates) - own:
            break
        left = left[found[:, k - 1] > bounds.amax(1)]  # another one may be nearer
        if not len(left):
            break
    return distances, indices


def _each(queries: Points, candidates: Points, m: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the m least bounds and their indices `[N, m]`; `own` `[N]` is what each query may not find."""
    found, every = [], torch.arange(len(queries.norms), device=queries.norms.device)
    for rows in in_parts(every.split(ROWS), "nearest neighbours"):
        bounds = queries[rows].at_least(candidates)
        if own is not None:
            bounds.scatter_(1, own[rows, None], math.inf)
        found.append(bounds.topk(m, largest=False))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _all_pairs(cloud: Points, m: int) -> tuple[Tensor, Tensor]:
    """Return the m least bounds between different points, `[N, m]`, and their indices; each pair is computed once."""
    count = len(cloud.norms)
    least = cloud.values.new_full((count, m), math.inf)
    index = torch.zeros((count, m), dtype=torch.long, device=least.device)

    def merge(rows: slice, bounds: Tensor, first: int) -> None:
        found = bounds.topk(min(m, bounds.shape[1]), largest=False)
        both = torch.cat([least[rows], found.values], 1)
        names = torch.cat([index[rows], found.indices + first], 1)
        least[rows], order = both.topk(m, largest=False)
        index[rows] = names.gather(1, order)

    for rows in in_parts(torch.arange(count).split(ROWS), "nearest neighbours"):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        bounds = cloud[start:stop].at_least(cloud[start:])
        bounds.diagonal().fill_(math.inf)
        merge(slice(start, stop), bounds, start)
        if stop < count:
            merge(slice(stop, count), bounds[:, stop - start :].T, start)
    return least, index


def _by_differences(queries: Tensor, rows: Tensor, candidates: Tensor, index: Tensor) -> Tensor:
    """Return the squared distances of some queries to their candidates, `[N, m]`, in float64."""
    found = []
    for part, near in zip(rows.split(64), index.split(64), strict=True):
        found.append((queries[part].double()[:, None] - candidates[near].double()).square().sum(2))
    return torch.cat(found)


def within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Return which of the `points` `[N, D]` are in a ball around any of the `centres` `[M, D]`, as bool `[N]`.

    `radii` `[M]` are squared, in float64. A point at exactly that distance is inside.
    """
    origin = centre(centres)
    dtype = precisions(points, centres)[0]
    cloud, info, found = Points.about(origin, centres, dtype), torch.finfo(dtype), []
    surely, perhaps = (radii * (1 - 4 * info.eps)).to(dtype), (radii * (1 + 4 * info.eps)).to(dtype)
    for part in in_parts(points.split(ROWS), "images within balls"):
        shifted = Points.about(origin, part, dtype)
        bounds = shifted.at_least(cloud)
        inside = (bounds + shifted.slack(cloud) < surely).any(1)
        close = (bounds <= perhaps) & ~inside[:, None]  # what rounding decides is computed by differences
        for row in close.any(1).nonzero().flatten().tolist():
            near = close[row].nonzero().flatten().split(ROWS)
            exact = ((part[row].double() - centres[i].double()).square().sum(1) <= radii[i] for i in near)
            inside[row] = any(bool(part_of.any()) for part_of in exact)
        found.append(inside)
    return torch.cat(found)
