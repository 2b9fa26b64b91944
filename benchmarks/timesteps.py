"""How much do the best timesteps help? `python benchmarks/timesteps.py runs/digits --output runs/timesteps`

For each number of steps K, and uniform, quadratic, best-for-bound and searched timesteps: bits/dim of the chain of K
steps on held-out digits (optimal variance), and the Frechet distance of DDIM's samples to the training images in
several sets of seeds. If it is interrupted, the same command resumes. Writes results.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from digits_quality import frechet_distance

from ddpm_hf import DDPMPipeline
from ddpm_hf.data.datasets import load_images
from ddpm_hf.diffusion.likelihood import bits_per_dim
from ddpm_hf.evaluation.features import make_extractor
from ddpm_hf.evaluation.optimal_variance import prediction_error
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.timesteps import best_for_bound, best_for_samples, power_spaced
from ddpm_hf.sampling.generation import generate, with_sampler


def main() -> None:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a digits pipeline")
    parser.add_argument("--output", default="runs/timesteps", help="folder for results.json")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--num_images", type=int, default=64, help="training and held-out images for the bound")
    parser.add_argument("--num_samples", type=int, default=500, help="images per distance")
    parser.add_argument("--num_trials", type=int, default=60, help="of the search")
    parser.add_argument("--seed_sets", type=int, default=3)
    arguments = parser.parse_args()
    n = arguments.num_samples
    path = Path(arguments.output) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}

    def once(key, compute):
        if key not in results:
            results[key] = compute()
            path.write_text(json.dumps(results, indent=1))
            print(key, results[key] if key != "error" else "", flush=True)
        return results[key]

    pipe = DDPMPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    sets = {s: load_images(dataset="digits", split=s, channels=1, resolution=(8, 8)) for s in ("train", "validation")}
    few = {s: data.subset(torch.arange(arguments.num_images)) for s, data in sets.items()}
    error = torch.tensor(once("error", lambda: prediction_error(pipe, few["train"]).tolist()), dtype=torch.float64)
    pipe.scheduler.set_prediction_error(error)
    optimal = with_sampler(pipe, "ddpm", "optimal").scheduler
    T, held_out = optimal.config.num_train_timesteps, few["validation"].images.float() / 127.5 - 1
    real = {s: data.images.reshape(-1, 64).double().numpy() * (16 / 255) for s, data in sets.items()}
    pixels = make_extractor("pixels", pipe.image_shape)

    def searched(K: int) -> list[int]:
        options = EvaluationOptions(num_samples=n, num_inference_steps=K, batch_size=n, seed=10_000)
        features = pixels(sets["validation"].images)["features"]
        return best_for_samples(with_sampler(pipe, "ddim"), features, pixels, options, arguments.num_trials, print)

    def distance(K: int, timesteps: list[int], seeds: int) -> float:
        ddim = with_sampler(pipe, "ddim")
        ddim.scheduler.register_to_config(_timesteps={str(K): timesteps}, _timestep_spacing="best")
        drawn = generate(ddim, range(n * seeds, n * (seeds + 1)), batch_size=n, num_inference_steps=K)
        samples = torch.cat([images for _, images in drawn]).reshape(n, -1).double().numpy() * (16 / 255)
        return frechet_distance(samples, real["train"])

    def bound(timesteps: list[int]) -> float:
        return bits_per_dim(pipe.unet, optimal, held_out, timesteps=timesteps).total_bpd.double().mean().item()

    once("bits/dim, 1000", lambda: bound(list(range(T - 1, -1, -1))))
    for K in arguments.steps:
        rows = {
            "uniform": power_spaced(T, K, 1),
            "quadratic": power_spaced(T, K, 2),
            "bound": once(f"bound {K}", lambda K=K: best_for_bound(pipe, few["train"], error, K))[0],
            "samples": once(f"samples {K}", lambda K=K: searched(K))[0],
        }
        for name, timesteps in rows.items():
            once(f"bits/dim, {name}, {K}", lambda timesteps=timesteps: bound(timesteps))
            for s in range(arguments.seed_sets):
                once(f"distance, {name}, {K}, {s}", lambda K=K, t=timesteps, s=s: distance(K, t, s))
            values = [results[f"distance, {name}, {K}, {s}"] for s in range(arguments.seed_sets)]
            spread = max(abs(v - np.mean(values)) for v in values)
            print(f"| {K} | {name} | {results[f'bits/dim, {name}, {K}']:.3f} | {np.mean(values):.2f} ± {spread:.2f} |")


if __name__ == "__main__":
    main()
