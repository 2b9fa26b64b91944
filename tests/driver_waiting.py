"""Run by tests as one of two processes that share work: one works long, or fails where the other does not.

usage: driver_waiting.py FOLDER        prints, as JSON, what happened in this process
"""

import json
import os
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from conftest import make_small_unet

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.data.datasets import load_images
from ddpm_hf.evaluation import run as evaluation
from ddpm_hf.pipelines.checkpoints import find_checkpoint
from ddpm_hf.sampling import generation
from ddpm_hf.utils.errors import UserError
from ddpm_hf.utils.processes import gather, processes, raise_on_all_ranks

folder, first = Path(sys.argv[1]), os.environ["RANK"] == "0"
SHORT = timedelta(seconds=2)
torch.distributed.init_process_group("gloo", timeout=SHORT)
assert processes().num_processes == 2
store = torch.distributed.FileStore(str(folder / "store"), 2)
found = {}

# The first works until a collective that waits for it has been given up.
bystanders = torch.distributed.new_group(timeout=SHORT)


def wait_in_a_collective():
    try:
        torch.distributed.barrier(group=bystanders)
    except RuntimeError:
        store.set("given up", "")


if not first:
    threading.Thread(target=wait_in_a_collective).start()
with raise_on_all_ranks():
    if first:
        store.wait(["given up"], timedelta(seconds=100))
found["waited"] = gather("first" if first else "second")


def outcome(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, isinstance(error, UserError), str(error)]
    return None


def fail(error):
    with raise_on_all_ranks():
        if first:
            raise error


found["a mistake"] = outcome(lambda: fail(UserError("give another folder")))
found["a disk"] = outcome(lambda: fail(OSError(28, "No space left on device")))
found["a fault"] = outcome(lambda: fail(ValueError("5 is not in list")))

# What only the second process meets.
pipe = DDPMPipeline(make_small_unet(), DDPMScheduler())
save, check = generation.save_picture, evaluation.checked_extractors


def full(*arguments, **options):
    if not first:
        raise OSError(28, "No space left on device")
    save(*arguments, **options)


def not_installed(*arguments):
    if not first:
        raise UserError("the Inception weights are not on this machine")
    return check(*arguments)


generation.save_picture, evaluation.checked_extractors = full, not_installed
short = {"batch_size": 1, "num_inference_steps": 2}
found["samples"] = outcome(lambda: generation.write_samples(pipe, [0, 1, 2, 3], folder / "samples", **short))
sets = {"validation": load_images(dataset="digits", split="validation", channels=1)}
found["features"] = outcome(lambda: evaluation.evaluate(pipe, sets, ["fid"], features=["pixels"], num_samples=4))

for step in (1, 2):
    (folder / "run" / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
found["checkpoint"] = outcome(lambda: find_checkpoint(folder / "run", "latest"))
print(json.dumps(found))
torch.distributed.destroy_process_group()
