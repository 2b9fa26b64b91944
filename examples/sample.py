"""Load a trained model and draw images: `python examples/sample.py runs/digits samples.png`."""

import argparse

import torch

from ddpm_hf import DDPMPipeline
from ddpm_hf.utils.visualize import image_grid, save_picture

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a pipeline's folder, or its name on the Hub")
parser.add_argument("picture", help="the PNG to write")
arguments = parser.parse_args()

pipe = DDPMPipeline.from_pretrained(arguments.model)
generator = torch.Generator().manual_seed(0)
images = pipe(batch_size=16, generator=generator, output_type="pt").images  # Algorithm 2, all T steps
save_picture(image_grid((images * 255).round().byte()), arguments.picture)
print(f"wrote {arguments.picture}")
