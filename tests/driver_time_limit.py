"""Run by tests as one of two processes: a run of one minute by clocks that differ; prints how it ended here, as JSON.

An update takes a second of the first process's clock, and three of the other's; nothing else takes any time.

usage: driver_time_limit.py OUTPUT_DIR
"""

import dataclasses
import json
import sys

import ddpm_hf.presets as presets
from ddpm_hf import Trainer, TrainingConfig
from ddpm_hf.training import time_limit
from ddpm_hf.training.publishing import Publisher

digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16)}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}
now, written = 0.0, []
write, update = Publisher._write_pipeline, Trainer._update


def timed(self, step):
    global now
    now += 1.0 if self.accelerator.is_main_process else 3.0
    return update(self, step)


def noted(self, pipe):
    written.append(run.step)
    write(self, pipe)


time_limit.clock = lambda: now
Trainer._update, Publisher._write_pipeline = timed, noted
Publisher.seconds_to_complete = lambda self, weights, step: {"grid": 5.0, "numbers": 0.0}
run = Trainer(
    TrainingConfig(
        preset="digits",
        output_dir=sys.argv[1],
        max_train_minutes=1.0,
        total_batch_size=4,
        lr_warmup_steps=4,
        save_images_steps=25,
        num_sample_images=2,
        sampler="ddim",
        ddpm_num_inference_steps=1,
        eval_num_images=0,
    )
)
assert run.accelerator.num_processes == 2
assert run.train() is not None
print(json.dumps({"updates": run.step, "rate": run.lr_schedule.get_last_lr(), "written": written}))
