"""A demo of denoising diffusion models: watch them sample, interpolate, measure bits/dim. See README.md."""

import os
from pathlib import Path

from ddpm_hf.hub.space_demo import Limits
from ddpm_hf.hub.space_page import serve

# Folders (here or in the working directory) or names on the Hub, with commas between them; visitors choose one.
MODELS = os.environ.get("DDPM_HF_SPACE_MODELS") or "runs/digits"
MAX_IMAGES = 16  # that one visitor can ask for at once
MAX_STEPS = 1000  # of the sampler
MAX_WAITING = 20  # visitors in the queue; the next one is told to come later

if __name__ == "__main__":
    serve(MODELS, Limits(MAX_IMAGES, MAX_STEPS, MAX_WAITING), Path(__file__).parent)
