"""Run by tests as one of two processes of a run that are on machines without a shared disk: each has its own folder.

usage: RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=PORT driver_folders.py FLAGS
"""

import dataclasses
import sys

import ddpm_hf.presets as presets
from ddpm_hf.cli import run, train

digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16)}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}

if __name__ == "__main__":
    sys.exit(run(train, sys.argv[1:], "train.py"))
