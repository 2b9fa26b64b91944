"""Train a DDPM: `accelerate launch examples/train.py --config examples/configs/digits.yaml`.

Flags are those of diffusers' unconditional training example, and more; `--help` lists them. All of the work is done by
`ddpm_hf.Trainer`, so that a notebook can do the same:

    from ddpm_hf import Trainer, TrainingConfig

    Trainer(TrainingConfig(preset="digits", output_dir="runs/digits")).train()
"""

import sys

from ddpm_hf.cli import run, train

if __name__ == "__main__":
    sys.exit(run(train, sys.argv[1:], "train.py"))
