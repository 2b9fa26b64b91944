"""How good are few steps? `python benchmarks/few_steps.py runs/digits --output runs/few_steps`

The Frechet distance (means and covariances of the pixels, levels 0..16) between samples of a digits model and the
training images, for every sampler and number of network evaluations, in several sets of seeds; and for each variance
of the ancestral sampler over the whole chain once. If it is interrupted, the same command resumes. Writes table.md and
results.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from digits_quality import frechet_distance

from ddpm_hf import DDPMPipeline
from ddpm_hf.data.datasets import load_images
from ddpm_hf.evaluation.optimal_variance import prediction_error
from ddpm_hf.sampling.generation import with_sampler, write_samples

ANCESTRAL = {
    "ancestral, optimal variance": ("ddpm", "optimal"),
    "ancestral, fixed_small": ("ddpm", "fixed_small"),
    "ancestral, fixed_large": ("ddpm", "fixed_large"),
}
ROWS = {
    **ANCESTRAL,
    "DDIM": ("ddim", None),
    "DPM-Solver++": ("dpmsolver++", None),
    "UniPC": ("unipc", None),
    "DEIS": ("deis", None),
    "SA-Solver": ("sa_solver", None),
    "Heun": ("heun", None),
}


def measured_error(pipe: DDPMPipeline, path: Path) -> list[float]:
    """The network's error at every t, measured once."""
    if not path.exists():
        data = load_images(dataset="digits", split="train", channels=1, resolution=(8, 8)).subset(torch.arange(128))
        path.write_text(json.dumps(prediction_error(pipe, data, progress=True).tolist()))
    return json.loads(path.read_text())


def table(results: dict[str, float], steps: list[int], T: int) -> str:
    """Mean and largest distance from it over the sets of seeds, as Markdown."""
    lines = [
        "| sampler | " + " | ".join(f"{k} evaluations" for k in steps) + f" | {T} evaluations |",
        "|---|" + "---|" * (len(steps) + 1),
    ]
    for row in ROWS:
        cells = []
        for k in [*steps, T]:
            values = [v for key, v in results.items() if key.startswith(f"{row} / {k} / ")]
            spread = max((abs(v - np.mean(values)) for v in values), default=0)
            mean = f"{np.mean(values):.2f}" if values else ""
            cells.append(mean + (f" ± {spread:.2f}" if len(values) > 1 else ""))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw what is missing, one row of the table after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a digits pipeline")
    parser.add_argument("--output", default="runs/few_steps", help="folder for samples and results")
    parser.add_argument("--num_samples", type=int, default=2000, help="images per distance")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50, 10, 20, 100], help="network evaluations, in order"
    )
    parser.add_argument("--seed_sets", type=int, default=3, help="sets of seeds for each number of steps")
    parser.add_argument("--batch_size", type=int, default=250)
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)

    pipe = DDPMPipeline.from_pretrained(arguments.model)
    pipe.scheduler.set_prediction_error(measured_error(pipe, folder / "prediction_error.json"))
    T = pipe.scheduler.config.num_train_timesteps
    real = load_images(dataset="digits", split="train", channels=1, resolution=(8, 8)).images
    real = real.reshape(-1, 64).double().numpy() * (16 / 255)

    units = [(row, k, s) for k in arguments.steps[:1] for s in range(arguments.seed_sets) for row in ROWS]
    units += [(row, T, 0) for row in ANCESTRAL]
    units += [(row, k, s) for k in arguments.steps[1:] for s in range(arguments.seed_sets) for row in ROWS]
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for row, k, seed_set in units:
        key = f"{row} / {k} / {seed_set}"
        if key in results:
            continue
        sampler, variance = ROWS[row]
        n = arguments.num_samples
        file = folder / "samples.npz"
        write_samples(
            with_sampler(pipe, sampler, variance),
            range(n * seed_set, n * (seed_set + 1)),
            file,
            batch_size=arguments.batch_size,
            num_inference_steps=(k + 1) // 2 if sampler == "heun" else k,  # K steps of Heun are 2K - 1 evaluations
            progress=True,
        )
        samples = np.load(file)["arr_0"].reshape(n, -1) * (16 / 255)
        file.unlink()
        results[key] = frechet_distance(samples, real)
        path.write_text(json.dumps(results, indent=2))
        print(f"{key}: {results[key]:.3f}", flush=True)
        steps = sorted(arguments.steps)
        (folder / "table.md").write_text(table(results, steps, T))
    print(table(results, sorted(arguments.steps), T))


if __name__ == "__main__":
    main()
