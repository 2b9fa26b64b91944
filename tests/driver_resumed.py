"""Run by tests under torchrun: a run that is whole, one that is resumed, and one resumed with DDP's first buckets.

usage: driver_resumed.py FOLDER
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import ddpm_hf.presets as presets
from ddpm_hf import Trainer, TrainingConfig

folder = Path(sys.argv[1])
digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16), "dropout": 0.1}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}


def trainer(name: str) -> Trainer:
    return Trainer(
        TrainingConfig(
            preset="digits",
            output_dir=str(folder / name),
            resume_from_checkpoint="latest",
            max_train_steps=6,
            total_batch_size=24,
            train_batch_size=4,
            channels_last=True,
            lr_warmup_steps=2,
            checkpointing_steps=3,
            num_sample_images=2,
            ddpm_num_inference_steps=2,
            eval_num_images=2,
            eval_num_evaluations=2,
        )
    )


whole = trainer("whole")
whole.train(end_processes=False)
for name in ("resumed", "unsettled"):
    if whole.accelerator.is_main_process:
        shutil.copytree(folder / "whole" / "checkpoint-3", folder / name / "checkpoint-3")
    whole.accelerator.wait_for_everyone()
    resumed = trainer(name)
    assert (resumed.step, resumed.plan.num_processes, resumed.plan.accumulation) == (3, 3, 2)
    if name == "unsettled":
        resumed._settle_buckets = lambda: None
    resumed.train(end_processes=name == "unsettled")
