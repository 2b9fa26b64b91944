"""How good are distilled models? `python benchmarks/distillation.py runs/digits runs/digits-4 runs/digits-2`

The Frechet distance (means and covariances of the pixels, levels 0..16) between 2,000 samples and the training images,
in three sets of seeds: each student with its own steps, drawn by this package and by stock diffusers in a process that
cannot import it, and the teacher by DDIM with 50 steps. Writes table.md, and a grid of images for each row.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from digits_quality import frechet_distance

from ddpm_hf import DDPMPipeline
from ddpm_hf.data.datasets import load_images
from ddpm_hf.sampling.generation import generate, with_sampler
from ddpm_hf.utils.visualize import image_grid, save_picture

COUNT, SETS = 2000, 3  # images per distance, and distances

STOCK = """
import sys; sys.modules["ddpm_hf"] = None
import diffusers, numpy as np, torch
folder, out, steps, count, seed = sys.argv[1:]
pipe = diffusers.DDPMPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": int(steps), "output_type": "np"}
images = pipe(batch_size=int(count), generator=torch.Generator().manual_seed(int(seed)), **options).images
np.save(out, (images * 255).round().astype(np.uint8))
"""


def draw(pipe: DDPMPipeline, steps: int, seed_set: int) -> torch.Tensor:
    """Return samples of this package, `[N, 1, 8, 8]` uint8."""
    seeds = range(COUNT * seed_set, COUNT * (seed_set + 1))
    return torch.cat([x for _, x in generate(pipe, seeds, batch_size=250, num_inference_steps=steps)])


def draw_in_stock(folder: str, steps: int, seed_set: int, file: Path) -> torch.Tensor:
    """Return samples of stock diffusers, `[N, 1, 8, 8]` uint8."""
    command = [sys.executable, "-c", STOCK, folder, str(file), str(steps), str(COUNT), str(seed_set)]
    subprocess.run(command, check=True)
    return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)


def main() -> None:
    """Draw and measure row after row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="folder of a digits pipeline, or none to leave it out")
    parser.add_argument("students", nargs="+", help="folders of what ddpm-hf distill made of it")
    parser.add_argument("--output", default="runs/distillation", help="folder for the table and the pictures")
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    lines = ["| sampler | evaluations | ddpm_hf | stock diffusers |", "|---|---|---|---|"]
    folder.mkdir(parents=True, exist_ok=True)
    real = load_images(dataset="digits", split="train", channels=1, resolution=(8, 8)).images
    real = real.reshape(-1, 64).double().numpy() * (16 / 255)

    def measure(name: str, sets: list[torch.Tensor]) -> str:
        save_picture(image_grid(sets[0][:64]), folder / f"{name}.png")
        values = [frechet_distance(images.reshape(COUNT, 64).double().numpy() * (16 / 255), real) for images in sets]
        return f"{np.mean(values):.2f} ± {max(abs(v - np.mean(values)) for v in values):.2f}"

    def add(sampler: str, steps: int, *cells: str) -> None:
        lines.append(f"| {sampler} | {steps} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        (folder / "table.md").write_text("\n".join(lines) + "\n")

    for name in arguments.students:
        student = DDPMPipeline.from_pretrained(name)
        steps = student.checked_steps(None)
        ours = [draw(student, steps, k) for k in range(SETS)]
        stock = [draw_in_stock(name, steps, k, folder / "stock.npy") for k in range(SETS)]
        add("student", steps, measure(f"student-{steps}", ours), measure(f"student-{steps}-stock", stock))
    if arguments.teacher != "none":
        teacher = with_sampler(DDPMPipeline.from_pretrained(arguments.teacher), "ddim")
        add("teacher, DDIM", 50, measure("teacher", [draw(teacher, 50, k) for k in range(SETS)]), "")


if __name__ == "__main__":
    main()
