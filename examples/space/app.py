"""A demo of denoising diffusion models: watch them sample, interpolate, measure bits/dim. See README.md."""

from ddpm_hf.hub.space_app import serve

MODELS = "runs/digits"  # folders (here or in the working directory) or names on the Hub, with commas between them
MAX_IMAGES = 16  # that one visitor can ask for at once
MAX_STEPS = 1000  # of the sampler
MAX_WAITING = 20  # visitors in the queue; the next one is told to come later

if __name__ == "__main__":
    serve(__file__, MODELS, MAX_IMAGES, MAX_STEPS, MAX_WAITING)
