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
        norms = values.new_empty(len(values))
        for start in range(0, len(values), ROWS):
            norms[start : start + ROWS] = values[start : start + ROWS].square().sum(1)
        return cls(values, norms)

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
        if own and len(left) == len(queries):
            least = _all_pairs(Points.about(origin, candidates, dtype), m)
        else:
            least = _each(Points.about(origin, queries[left], dtype), candidates, origin, m, left if own else None)
        index = least.indices.sort(dim=1).values  # of two at the same distance the first one
        found = _by_differences(queries, left, candidates, index)
        found, order = found.sort(dim=1, stable=True)
        distances[left], indices[left] = found[:, :k], index.gather(1, order)[:, :k]
        if m >= len(candidates) - own:
            break
        left = left[found[:, k - 1] > least.bounds.amax(1)]  # another one may be nearer
        if not len(left):
            break
    return distances, indices


class _Least:
    """The m least bounds of each query so far, and their indices, `[N, m]`."""

    def __init__(self, queries: Points, m: int):
        self.bounds = queries.values.new_full((len(queries.norms), m), math.inf)
        self.indices = torch.zeros(self.bounds.shape, dtype=torch.long, device=self.bounds.device)

    def add(self, rows: slice, bounds: Tensor, first: int) -> None:
        """Take into account the bounds of some queries to the candidates from `first` on, `[n, ...]`."""
        m = self.bounds.shape[1]
        found = bounds.topk(min(m, bounds.shape[1]), largest=False)
        both = torch.cat([self.bounds[rows], found.values], 1)
        names = torch.cat([self.indices[rows], found.indices + first], 1)
        self.bounds[rows], order = both.topk(m, largest=False)
        self.indices[rows] = names.gather(1, order)


def _each(queries: Points, candidates: Tensor, origin: Tensor, m: int, own: Tensor | None) -> _Least:
    """Find the m least bounds of each query; `own` `[N]` is what it may not find."""
    least, count = _Least(queries, m), len(queries.norms)
    for part in in_parts(
        torch.arange(len(candidates), device=candidates.device).split(8 * ROWS), "nearest neighbours"
    ):
        cloud = Points.about(origin, candidates[part], queries.values.dtype)  # a part: in float64 all may be large
        for start in range(0, count, ROWS):
            rows = slice(start, min(start + ROWS, count))
            bounds = queries[rows].at_least(cloud)
            if own is not None:
                bounds.masked_fill_(own[rows, None] == part, math.inf)
            least.add(rows, bounds, int(part[0]))
    return least


def _all_pairs(cloud: Points, m: int) -> _Least:
    """Find the m least bounds between different points; each pair is computed once."""
    least, count = _Least(cloud, m), len(cloud.norms)
    for rows in in_parts(torch.arange(count).split(ROWS), "nearest neighbours"):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        bounds = cloud[start:stop].at_least(cloud[start:])
        bounds.diagonal().fill_(math.inf)
        least.add(slice(start, stop), bounds, start)
        if stop < count:
            least.add(slice(stop, count), bounds[:, stop - start :].T, start)
    return least


def _by_differences(queries: Tensor, rows: Tensor, candidates: Tensor, index: Tensor) -> Tensor:
    """Return the squared distances of some queries to their candidates, `[N, m]`, in float64."""
    found = torch.empty(index.shape, dtype=torch.float64, device=index.device)
    for start in range(0, len(rows), 64):  # parts that are kept one by one would keep the freed ones between them
        part = slice(start, start + 64)
        differences = queries[rows[part]].double()[:, None] - candidates[index[part]].double()
        found[part] = differences.square_().sum(2)
    return found


def within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Return which of the `points` `[N, D]` are in a ball around any of the `centres` `[M, D]`, as bool `[N]`.

    `radii` `[M]` are squared, in float64. A point at exactly that distance is inside.
    """
    origin = centre(centres)
    dtype = precisions(points, centres)[0]
    cloud, info = Points.about(origin, centres, dtype), torch.finfo(dtype)
    inside = torch.empty(len(points), dtype=torch.bool, device=points.device)
    surely, perhaps = (radii * (1 - 4 * info.eps)).to(dtype), (radii * (1 + 4 * info.eps)).to(dtype)
    for rows in in_parts(torch.arange(len(points), device=points.device).split(ROWS), "images within balls"):
        shifted = Points.about(origin, points[rows], dtype)
        bounds = shifted.at_least(cloud)
        inside[rows] = (bounds + shifted.slack(cloud) < surely).any(1)
        close = (bounds <= perhaps) & ~inside[rows, None]  # what rounding decides is computed by differences
        for i in close.any(1).nonzero().flatten().tolist():
            near, point = close[i].nonzero().flatten().split(ROWS), points[rows[i]].double()
            exact = ((point - centres[part].double()).square().sum(1) <= radii[part] for part in near)
            inside[rows[i]] = any(bool(found.any()) for found in exact)
    return inside
