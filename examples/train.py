# /// script
# requires-python = ">=3.11"
# dependencies = ["ddpm-hf[train]"]
# ///
"""Train a DDPM: `accelerate launch examples/train.py --config examples/configs/digits.yaml`.

This file alone is enough where uv is: `uv run train.py --preset digits`, or `hf jobs uv run train.py ...` on a GPU of
the Hub. uv installs the released package then, as the lines above say; in a clone `uv run python examples/train.py`
runs what is checked out.

Flags are those of diffusers' unconditional training example, and more; `--help` lists them. All of the work is done by
`ddpm_hf.Trainer`, so that a notebook can do the same:

    from ddpm_hf import Trainer, TrainingConfig

    Trainer(TrainingConfig(preset="digits", output_dir="runs/digits")).train()
"""

import sys

from ddpm_hf.cli import run, train

if __name__ == "__main__":
    sys.exit(run(train, sys.argv[1:], "train.py"))
