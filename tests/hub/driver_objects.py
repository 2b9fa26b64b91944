"""Pushes pipelines and their parts to the Hub that the environment names: jobs as JSON on stdin, results on stdout.

A job names what is pushed (`pipeline`, `unet`, `scheduler`), by which method, from which model, and the arguments.
"""

import json
import sys

from diffusers.utils import logging
from huggingface_hub.utils import disable_progress_bars

from ddpm_hf import DDPMPipeline


def run(job: dict) -> dict:
    pipe = DDPMPipeline.from_pretrained(job.pop("model"))
    what, method = job.pop("what", "pipeline"), job.pop("method", "push_to_hub")
    try:
        push = getattr(pipe if what == "pipeline" else getattr(pipe, what), method)
        return {"url": str(push(*job.pop("arguments"), **job))}
    except (ValueError, OSError) as error:
        return {"error": str(error), "kind": type(error).__name__}


if __name__ == "__main__":
    disable_progress_bars()
    logging.set_verbosity_error()
    jobs, out = json.load(sys.stdin), sys.stdout
    sys.stdout = sys.stderr  # what a push says
    print(json.dumps([run(job) for job in jobs]), file=out)
