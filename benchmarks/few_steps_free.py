"""What do epsilon scaling and autoguidance change? `python benchmarks/few_steps_free.py runs/digits --steps 10 20`

Frechet distances as those of `few_steps.py`, in several sets of seeds: without either, with the epsilon divided by a
constant and by a ramp (both found on held-out images with other seeds), and guided by `--guide`. If it is interrupted,
the same command resumes. Writes table.md and results.json.
"""

import argparse
import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from digits_quality import frechet_distance
from few_steps import measured_error

from ddpm_hf import DDPMPipeline
from ddpm_hf.data.datasets import load_images
from ddpm_hf.evaluation.epsilon_scaling import find_epsilon_scale, sample_distance
from ddpm_hf.evaluation.features import Pixels
from ddpm_hf.pipelines.inference import InferenceOptions, optimize_for_inference
from ddpm_hf.sampling.generation import generate, with_sampler

SAMPLERS = {"DDIM": ("ddim", None), "DPM-Solver++": ("dpmsolver++", None), "ancestral, optimal": ("ddpm", "optimal")}
FOR_SEARCH = 1_000_000  # the first seed to search with


def main() -> None:
    """Measure what is missing, one row of the table after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a digits pipeline")
    parser.add_argument("--output", default="runs/few_steps_free", help="folder for results")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--scalings", nargs="+", default=["plain", "b", "ramp"], choices=["plain", "b", "ramp"])
    parser.add_argument("--guide", help="folder of a worse pipeline: measure autoguidance instead of scaling")
    parser.add_argument("--guidance", nargs="+", default=["1.5", "2", "2,100,600"], help="W, or W,LOW,HIGH")
    parser.add_argument("--num_samples", type=int, default=2000, help="images per distance")
    parser.add_argument("--search_samples", type=int, default=500, help="images per distance of a search")
    parser.add_argument("--seed_sets", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=250)
    arguments = parser.parse_args()
    folder, n = Path(arguments.output), arguments.num_samples
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    pipe = DDPMPipeline.from_pretrained(arguments.model)
    if any(SAMPLERS[name][1] for name in arguments.samplers):
        pipe.scheduler.set_prediction_error(measured_error(pipe, folder / "prediction_error.json"))
    T = pipe.scheduler.config.num_train_timesteps
    if arguments.guide:
        pipe.guide = DDPMPipeline.from_pretrained(arguments.guide)
    optimize_for_inference(pipe, options=InferenceOptions())
    train, held_out = (
        load_images(dataset="digits", split=s, channels=1, resolution=(8, 8)) for s in ("train", "validation")
    )
    real = train.images.reshape(-1, 64).double().numpy() * (16 / 255)

    def kept(key, make):
        if key not in results:
            results[key] = make()
            path.write_text(json.dumps(results, indent=2))
            print(f"{key}: {results[key]}", flush=True)
        return results[key]

    @cache
    def searched(sampling, k):
        """The distance of held-out images and other seeds as a function of the scale."""
        seeds = range(FOR_SEARCH, FOR_SEARCH + arguments.search_samples)
        options = {"num_inference_steps": k, "batch_size": arguments.batch_size}
        return cache(sample_distance(sampling, held_out, Pixels((1, 8, 8)), seeds, **options))

    def scale_of(sampling, name, k, how):
        if how == "plain":
            return None
        search = partial(find_epsilon_scale, searched(sampling, k), T, how == "ramp")
        return kept(f"scale / {name} / {k} / {how}", search)

    def distance(sampling, seeds, **options):
        drawn = generate(sampling, seeds, batch_size=arguments.batch_size, **options)
        samples = torch.cat([images for _, images in drawn]).reshape(n, 64).double().numpy() * (16 / 255)
        return frechet_distance(samples, real)

    lines = ["| sampler | steps | | distance |", "|---|---|---|---|"]
    for k in arguments.steps:
        for name in arguments.samplers:
            sampling = with_sampler(pipe, *SAMPLERS[name])
            for how in arguments.guidance if arguments.guide else arguments.scalings:
                options = {"num_inference_steps": k}
                if arguments.guide:
                    options["guidance_scale"], *interval = map(float, how.split(","))
                    options["guidance_interval"] = interval or None
                    how = f"guided, {how}"
                else:
                    options["epsilon_scale"] = scale_of(sampling, name, k, how)
                d = []
                for s in range(arguments.seed_sets):
                    seeds = range(n * s, n * (s + 1))
                    d.append(kept(f"{name} / {k} / {how} / {s}", partial(distance, sampling, seeds, **options)))
                spread = max(abs(x - np.mean(d)) for x in d)
                lines.append(f"| {name} | {k} | {how} | {np.mean(d):.2f} ± {spread:.2f} |")
                (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
