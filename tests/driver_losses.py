"""Run by tests: the losses of a few updates, summed over processes, as JSON; one entry for each run.

usage: driver_losses.py OUT SETTINGS_OF_RUNS_AS_JSON
"""

import dataclasses
import json
import sys

import torch
from accelerate.utils import gather_object

import ddpm_hf.presets as presets
from ddpm_hf import EvaluationReport, Trainer, TrainingConfig

out, settings = sys.argv[1], json.loads(sys.argv[2])
digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16), "dropout": 0.0}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}

found = {}
for run in settings:
    trainer = Trainer(TrainingConfig(**run))
    losses = []
    trainer.model.train()
    for step in range(trainer.recipe.max_train_steps):
        losses.append(trainer._update(step)[0].item())
        trainer.step = step + 1
    pipe = trainer.publisher.pipeline(trainer._ema_state_dict())
    trainer.publisher.write_model(pipe, trainer.step)
    trainer.publisher.complete(pipe, trainer.step, trainer.seconds())
    rows = gather_object([losses])
    weights = torch.cat([p.flatten() for p in pipe.unet.parameters()])
    report = EvaluationReport.load(trainer.output_dir / "evaluation.json")
    found[trainer.output_dir.name] = {
        "losses": [sum(column) for column in zip(*rows, strict=True)],
        "processes": trainer.accelerator.num_processes,
        "bits_per_dim": report.values["bits_per_dim"]["value"],
        "weights": weights.tolist(),
    }
if trainer.accelerator.is_main_process:
    with open(out, "w") as file:
        json.dump(found, file)
