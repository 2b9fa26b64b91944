"""Loads pipelines by name from the Hub that the environment names: jobs as JSON on stdin, results on stdout.

The first argument says with what: `ddpm_hf`, or `diffusers` in a process where ddpm_hf cannot be imported. A result
has the class, a hash of the weights and an image, or the error's sentence. A job may wait for a file to appear, before
which the caller changes the Hub.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch

if sys.argv[1] == "diffusers":
    sys.modules["ddpm_hf"] = None  # importing it is an error now
    from diffusers import DDPMPipeline
else:
    from ddpm_hf import DDPMPipeline
from diffusers.utils import logging
from huggingface_hub.utils import disable_progress_bars


def load(job: dict) -> dict:
    if wait := job.pop("wait_for", None):
        Path(wait + ".reached").touch()
        while not Path(wait).exists():
            time.sleep(0.02)
    draw = job.pop("draw", False)
    try:
        pipe = DDPMPipeline.from_pretrained(job.pop("name"), **job)
    except (OSError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    weights = hashlib.sha256()
    for name, tensor in sorted(pipe.unet.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    result = {"class": f"{type(pipe).__module__}.{type(pipe).__name__}", "weights": weights.hexdigest()}
    if draw:
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np"
        )
        result["images"] = images.images.round(4).tolist()
    return result


if __name__ == "__main__":
    disable_progress_bars()
    logging.set_verbosity_error()
    print(json.dumps([load(job) for job in json.load(sys.stdin)]))
