"""The best K of T timesteps: by dynamic programming for the bound, by a short search for samples.

Watson et al. 2021 (arXiv 2106.03802): the bound of a chain is a sum over its steps, so the shortest path is the best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.tensors import ImageDataset, to_model_range
from ..diffusion.likelihood import bits_per_dim
from ..diffusion.scheduling_ddpm import LEARNED_VARIANCES, OPTIMAL_VARIANCE
from ..pipelines.pipeline_ddpm import DDPMPipeline, evaluating
from ..pipelines.schedulers import BEST, set_timesteps
from ..sampling.generation import with_sampler
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from .features import FeatureExtractor
from .metrics import frechet_distance, frechet_statistics
from .options import EvaluationOptions
from .samples import draw_samples


def step_costs(alpha_bar: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return E KL(q(x_s|x_t,x_0) || p(x_s|x_t)) for the step from t to s < t, bits/dim, `[T, T]`; infinite elsewhere.

    With the optimal variance sigma^2 = beta_tilde + c_0^2 error_t (c_0: the weight of x_0 in Eq. 7) the KL divergence
    is log(sigma^2 / beta_tilde) / 2, and c_0^2 / beta_tilde = SNR(s) - SNR(t) with SNR = alpha_bar / (1 - alpha_bar).
    `alpha_bar` and `error` (`prediction_error`) are `[T]`.
    """
    snr = alpha_bar / (1 - alpha_bar)
    cost = 0.5 * np.log2(1 + error[:, None] * np.maximum(snr[None] - snr[:, None], 0))
    return np.where(np.tri(len(error), k=-1, dtype=bool), cost, np.inf)


def shortest_chain(cost: np.ndarray, prior: np.ndarray, decoder: np.ndarray, K: int) -> tuple[list[int], float]:
    """Return the K falling timesteps whose bound is lowest, and that bound in bits/dim, by dynamic programming.

    `cost` is `[T, T]` (`step_costs`). `prior` and `decoder`, `[T]`: L_T of a chain that starts at t, and L_0 of one
    whose last step leads from t to the data.
    """
    value, choices = decoder, []  # value: of the best chain from t down to the data, with k timesteps
    for _ in range(K - 1):
        total = cost + value[None]  # [T, T]: from t to s, and from there on
        choices.append(total.argmin(1))
        value = total.min(1)
    chain = [int((value + prior).argmin())]
    best = float((value + prior).min())
    for choice in reversed(choices):
        chain.append(int(choice[chain[-1]]))
    return chain, best


@torch.no_grad()
def best_for_bound(
    pipe: DDPMPipeline, data: ImageDataset, error: Tensor, K: int, progress: bool = False, **options: Any
) -> tuple[list[int], float]:
    """Return the K timesteps of the lowest bound on these images, with the optimal variance, and that bound.

    `error` is that of `prediction_error`. L_0 and L_T are measured for all T timesteps: T network evaluations per
    image. `options` are `batch_size` and `seed` of `bits_per_dim`. A learned variance raises a UserError.
    """
    if pipe.scheduler.variance_type in LEARNED_VARIANCES:
        raise UserError("this network predicts its own variance; use --objective samples")
    scheduler = with_sampler(pipe, "ddpm", OPTIMAL_VARIANCE).scheduler
    scheduler.set_prediction_error(error)
    T, x_0 = scheduler.config.num_train_timesteps, to_model_range(data.images).to(pipe.device)
    if (labels := pipe.classes.of_dataset(data)) is not None:
        options["class_labels"] = labels.to(pipe.device)
    prior, decoder = np.empty(T), np.empty(T)
    with evaluating(pipe.unet), progress_bar(len(x_0), "ends of chains", show=progress) as bar:
        for t in range(T):  # the chain of the one step from t to the data has both
            one = bits_per_dim(pipe.network, scheduler, x_0, timesteps=[t], **options)
            prior[t], decoder[t] = one.prior_bpd.double().mean(), one.terms_bpd.double().mean()
            bar.update(len(x_0) / T)
    return shortest_chain(step_costs(scheduler.alpha_bar, error.double().numpy()), prior, decoder, K)


def power_spaced(T: int, K: int, power: float, last: int = 0) -> list[int]:
    """Return K falling timesteps from T-1 to `last`, spaced as (k / K)^power is: 1 uniform, 2 quadratic."""
    grown = last + (T - 1 - last) * np.linspace(0, 1, K) ** power if K > 1 else np.array([T - 1])
    chosen: list[int] = []
    for k, t in enumerate(grown.round().astype(int).tolist()):
        chosen.append(min(max(t, chosen[-1] + 1 if chosen else 0), T - K + k))
    return chosen[::-1]


def best_for_samples(
    pipe: DDPMPipeline,
    real: Tensor,
    extractor: FeatureExtractor,
    options: EvaluationOptions,
    num_trials: int,
    report: Callable[[str], Any] = lambda line: None,
) -> tuple[list[int], float, float]:
    """Search for the K timesteps whose samples are nearest to real images, by the Frechet distance of features.

    Tried are the sampler's own timesteps, power spacings, and then moves of one timestep between its neighbours, which
    are kept where they help; all with the same seeds.

    Args:
        pipe: The network and the sampler.
        real: The features of real images, `[N, D]`.
        extractor, options: What computes features; `num_inference_steps` (K), `num_samples`, `seed`, `batch_size`, ...
        num_trials: How many sets of timesteps are tried, each at `num_samples` times K evaluations.
        report: Called with a line for each improvement.

    Returns:
        The timesteps, and on seeds that the search did not see their distance and that of the sampler's own timesteps.
    """
    K, scheduler, target = options.num_inference_steps or 0, pipe.scheduler, frechet_statistics(real)
    T = scheduler.config.num_train_timesteps

    def distance(timesteps: Sequence[int], seed: int) -> float:
        scheduler.register_to_config(_timesteps={str(K): list(timesteps)}, _timestep_spacing=BEST)
        drawn = draw_samples(pipe, [extractor], dataclasses.replace(options, seed=seed))
        return frechet_distance(frechet_statistics(drawn.features[extractor.name, "uint8"]), target)

    set_timesteps(scheduler, K)
    own = list(dict.fromkeys(int(t) for t in scheduler.timesteps))  # second-order solvers come to them twice
    lasts = sorted({0, T // (20 * K), T // (4 * K)})
    tries = [own, *(power_spaced(T, K, power, last) for power in (1.0, 1.5, 2.0, 3.0) for last in lasts)]
    draw = np.random.default_rng(options.seed)
    best, lowest = own, np.inf
    with progress_bar(num_trials + 2, "search", "trial", show=options.progress) as bar:
        for trial in range(num_trials):
            candidate = tries[trial] if trial < len(tries) else _moved(best, T, draw)
            if (found := distance(candidate, options.seed)) < lowest:
                best, lowest = candidate, found
                report(f"{trial + 1} of {num_trials}: distance {found:.4g}, timesteps {' '.join(map(str, candidate))}")
            bar.update()
        unseen = options.seed + options.num_samples
        of_best = distance(best, unseen)
        bar.update()
        of_own = distance(own, unseen)
        bar.update()
    return best, of_best, of_own


def _moved(timesteps: Sequence[int], T: int, draw: np.random.Generator) -> list[int]:
    """Return the timesteps with one of them elsewhere between its neighbours."""
    k, edges = int(draw.integers(len(timesteps))), [T, *timesteps, -1]
    return [*timesteps[:k], int(draw.integers(edges[k + 2] + 1, edges[k])), *timesteps[k + 1 :]]
