"""Run by tests as one of two processes: a run whose first process gets SIGTERM in the last update.

usage: driver_stop.py OUTPUT_DIR
"""

import dataclasses
import os
import signal
import sys

import ddpm_hf.presets as presets
from ddpm_hf import Trainer, TrainingConfig

digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16)}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}
run = Trainer(
    TrainingConfig(
        preset="digits",
        output_dir=sys.argv[1],
        max_train_steps=3,
        total_batch_size=16,
        lr_warmup_steps=2,
        num_sample_images=2,
        ddpm_num_inference_steps=2,
        eval_num_images=2,
        eval_num_evaluations=2,
    )
)
make = run._update


def interrupted(step):
    if step == 2 and run.accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGTERM)
    return make(step)


run._update = interrupted
assert run.train() is None
