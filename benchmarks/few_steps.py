"""How good are few steps? `python benchmarks/few_steps.py runs/digits --students runs/digits-4 runs/digits-1`

The Frechet distance (means and covariances of the pixels, levels 0..16) between samples of a digits model and the
training images, for every method and number of network evaluations, in several sets of seeds: drawn by this package,
and by stock diffusers in a process that cannot import it. What stock needs (a model with a divided epsilon, saved
timesteps) is made first. If it is interrupted, the same command resumes. Writes table.md, results.json, a plot, and a
grid of images for each cell.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from digits_quality import frechet_distance
from matplotlib import colormaps, pyplot

from ddpm_hf import DDPMPipeline
from ddpm_hf.cli import main as command
from ddpm_hf.data.datasets import load_images
from ddpm_hf.evaluation.optimal_variance import prediction_error
from ddpm_hf.sampling.generation import generate, with_sampler
from ddpm_hf.utils.visualize import image_grid, save_picture

SCALED, CHOSEN, STUDENT = "DDIM, epsilon divided", "DPM-Solver++, searched timesteps", "distilled"
# sampler and variance of a method, and the evaluations it is measured for where these are not all
METHODS = {
    "ancestral, fixed_large": ("ddpm", "fixed_large", (10, 20, 50, 1000)),
    "ancestral, fixed_small": ("ddpm", "fixed_small", (10, 20, 50, 1000)),
    "ancestral, optimal variance": ("ddpm", "optimal", (10, 20, 50, 1000)),
    "DDIM": ("ddim", None, (1, 2, 4, 10, 20, 50)),
    SCALED: ("ddim", None, (10, 20, 50)),
    "DPM-Solver++": ("dpmsolver++", None, (1, 2, 4, 10, 20, 50)),
    CHOSEN: ("dpmsolver++", None, (4, 10)),
    "UniPC": ("unipc", None, (4, 10, 20, 50)),
    "DEIS": ("deis", None, (4, 10, 20, 50)),
    "SA-Solver": ("sa_solver", None, (4, 10, 20, 50)),
    "Heun": ("heun", None, (10, 20, 50)),  # K steps are 2K - 1 evaluations
    STUDENT: (None, None, ()),
}

# The loop of stock's pipelines, for all of its schedulers: some take no generator.
STOCK = """
import sys; sys.modules["ddpm_hf"] = None
import inspect, json, diffusers, numpy as np, torch
request = json.loads(sys.argv[1])
pipe = diffusers.DDPMPipeline.from_pretrained(request["model"])
unet, scheduler = pipe.unet, pipe.scheduler
if request["scheduler"]:
    scheduler = getattr(diffusers, request["scheduler"]).from_config(scheduler.config, **request["settings"])
generator = torch.Generator().manual_seed(request["seed"])
given = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
torch.manual_seed(request["seed"])
made = []
for start in range(0, request["count"], 250):
    n = min(250, request["count"] - start)
    if request["timesteps"]:
        scheduler.set_timesteps(timesteps=request["timesteps"])
    else:
        scheduler.set_timesteps(request["steps"])
    x = torch.randn(n, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, **given).prev_sample
    made.append(((x / 2 + 0.5).clamp(0, 1) * 255).round().byte())
np.save(request["output"], torch.cat(made).numpy())
"""


def draw(pipe: DDPMPipeline, steps: int, seeds: range) -> torch.Tensor:
    """Return samples of this package, `[N, 1, 8, 8]` uint8."""
    return torch.cat([images for _, images in generate(pipe, seeds, batch_size=250, num_inference_steps=steps)])


def draw_in_stock(folder: Path, pipe: DDPMPipeline, steps: int, seeds: range, file: Path) -> torch.Tensor:
    """Return samples of stock diffusers in a process of its own, `[N, 1, 8, 8]` uint8."""
    request = {"model": str(folder), "steps": steps, "count": len(seeds), "seed": seeds.start, "output": str(file)}
    request |= {"scheduler": None, "settings": {}, "timesteps": None}
    if not pipe.distilled_steps:
        config, name = pipe.scheduler.config, type(pipe.scheduler).__name__
        if config.get("_timestep_spacing") == "best":
            request["timesteps"] = config["_timesteps"][str(steps)]
        wanted = ("thresholding", "sample_max_value", "algorithm_type", "variance_type")
        request["settings"] = {key: config[key] for key in wanted if key in config and name != "DDIMScheduler"}
        request["scheduler"] = name
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(request)], check=True, capture_output=True)
    return torch.from_numpy(np.load(file))


class Models:
    """The folder of each cell's model; what is missing is made, and how long that took is kept."""

    def __init__(self, model: str, students: list[str], folder: Path):
        self.model, self.folder, self.pipes = Path(model), folder, {}
        self.students = {self.pipe(Path(name)).distilled_steps: Path(name) for name in students}
        self.seconds = folder / "seconds.json"

    def pipe(self, folder: Path) -> DDPMPipeline:
        """Load a folder once."""
        if folder not in self.pipes:
            self.pipes[folder] = DDPMPipeline.from_pretrained(folder)
            self.pipes[folder].set_progress_bar_config(disable=True)
        return self.pipes[folder]

    def of(self, method: str, evaluations: int) -> Path:
        """Return the model of a cell."""
        if method == STUDENT:
            return self.students[evaluations]
        if method not in (SCALED, CHOSEN):
            return self.model
        folder = self.folder / f"{'scaled' if method == SCALED else 'timesteps'}-{evaluations}"
        if not folder.exists():
            how = ["--dataset", "digits", "--num_inference_steps", str(evaluations), "--features", "pixels"]
            started = time.monotonic()
            if method == SCALED:
                how += ["--sampler", "ddim", "--num_samples", "500", "--output", str(folder)]
                assert command(["scale_epsilon", "--model", str(self.model), *how]) == 0
            else:
                self.pipe(self.model).save_pretrained(folder)
                how += ["--sampler", "dpmsolver++", "--objective", "samples", "--num_samples", "500"]
                assert command(["best_timesteps", "--model", str(folder), *how, "--num_trials", "40"]) == 0
            known = json.loads(self.seconds.read_text()) if self.seconds.exists() else {}
            self.seconds.write_text(json.dumps(known | {folder.name: time.monotonic() - started}))
        return folder


def measured_error(pipe: DDPMPipeline, path: Path) -> list[float]:
    """Return the network's error at every t, measured once."""
    if not path.exists():
        data = load_images(dataset="digits", split="train", channels=1, resolution=(8, 8)).subset(torch.arange(128))
        path.write_text(json.dumps(prediction_error(pipe, data, progress=True).tolist()))
    return json.loads(path.read_text())


def table(results: dict[str, float], steps: list[int]) -> str:
    """Return mean and largest distance from it over the sets of seeds, as Markdown; stock's after the stroke."""
    lines = ["| method | " + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps)]
    for method in METHODS:
        cells = []
        for k in steps:
            parts = []
            for where in ("ddpm_hf", "stock"):
                if values := [v for key, v in results.items() if key.startswith(f"{method} / {k} / {where} / ")]:
                    spread = max(abs(v - np.mean(values)) for v in values)
                    parts.append(f"{np.mean(values):.2f}" + f" ± {spread:.2f}" * (len(values) > 1))
            cells.append(" / ".join(parts))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, float], path: Path) -> None:
    """Draw the means of this package's samples over the number of evaluations."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = colormaps["tab20"].colors
    for method, color in zip(METHODS, (*colors[::2], *colors[1::2]), strict=False):
        sets: dict[int, list[float]] = {}
        for key, value in results.items():
            name, evaluations, where, _ = key.split(" / ")
            if name == method and where == "ddpm_hf":
                sets.setdefault(int(evaluations), []).append(value)
        if sets:
            means = [np.mean(sets[k]) for k in sorted(sets)]
            axes.loglog(sorted(sets), means, "o-" if len(sets) > 1 else "o", label=method, markersize=4, color=color)
    axes.set(xlabel="network evaluations per image", ylabel="Frechet distance (pixels, levels 0..16)")
    axes.set_xticks([1, 2, 4, 10, 20, 50], ["1", "2", "4", "10", "20", "50"], minor=False)
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Draw what is missing, one cell of the table after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a digits pipeline")
    parser.add_argument("--students", nargs="*", default=[], help="folders of what ddpm-hf distill made of it")
    parser.add_argument("--output", default="runs/few_steps", help="folder for models, pictures and results")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--num_samples", type=int, default=2000, help="images per distance")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[1, 2, 4, 10, 20, 50, 1000])
    parser.add_argument("--seed_sets", type=int, default=3, help="sets of seeds for each cell")
    parser.add_argument("--stock_sets", type=int, default=3, help="the same, in stock diffusers")
    arguments = parser.parse_args()
    folder, n = Path(arguments.output), arguments.num_samples
    folder.mkdir(parents=True, exist_ok=True)
    models = Models(arguments.model, arguments.students, folder)
    real = load_images(dataset="digits", split="train", channels=1, resolution=(8, 8)).images
    real = real.reshape(-1, 64).double().numpy() * (16 / 255)
    path = folder / "results.json"

    for method in arguments.methods:
        sampler, variance, known = METHODS[method]
        for k in [k for k in arguments.evaluations if k in (known or models.students)]:
            where = models.of(method, k)
            pipe = models.pipe(where)
            if variance == "optimal":
                pipe.scheduler.set_prediction_error(measured_error(pipe, folder / "prediction_error.json"))
            pipe = with_sampler(pipe, sampler, variance, "best" if method == CHOSEN else None)
            steps = (k + 1) // 2 if sampler == "heun" else k
            for s in range(max(arguments.seed_sets, arguments.stock_sets)):
                seeds = range(n * s, n * (s + 1))
                for name, sets in (("ddpm_hf", arguments.seed_sets), ("stock", arguments.stock_sets)):
                    key = f"{method} / {k} / {name} / {s}"
                    results = json.loads(path.read_text()) if path.exists() else {}
                    # stock has no optimal variance
                    if key in results or s >= sets or (name == "stock" and variance == "optimal"):
                        continue
                    started = time.monotonic()
                    if name == "stock":
                        images = draw_in_stock(where, pipe, steps, seeds, folder / "stock.npy")
                    else:
                        images = draw(pipe, steps, seeds)
                    samples = images.reshape(n, -1).double().numpy() * (16 / 255)
                    results[key] = frechet_distance(samples, real)
                    path.write_text(json.dumps(results, indent=2))
                    print(f"{key}: {results[key]:.3f} ({time.monotonic() - started:.0f} s)", flush=True)
                    (folder / "table.md").write_text(table(results, sorted(arguments.evaluations)))
                    if s == 0:
                        save_picture(image_grid(images[:64]), folder / f"{method}-{k}-{name}.png")
    plot(results, folder / "few_steps.png")
    print((folder / "table.md").read_text())


if __name__ == "__main__":
    main()
