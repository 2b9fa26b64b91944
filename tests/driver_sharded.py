"""Run by tests under torchrun: a training run whose weights are sharded by FSDP2, on CPUs.

accelerate shards on accelerators only; `fully_shard`, which its `prepare` calls there, stands in for `prepare` here.

usage: driver_sharded.py OUTPUT_DIR
"""

import dataclasses
import sys

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ddpm_hf.presets as presets
from ddpm_hf import Trainer, TrainingConfig

digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16), "dropout": 0.0}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}


def prepare(self, model, optimizer):
    names = [name for name, _ in model.named_parameters()]
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [sharded[name] for name in names]
    return model, optimizer


Accelerator.prepare = prepare
trainer = Trainer(
    TrainingConfig(
        preset="digits",
        output_dir=sys.argv[1],
        resume_from_checkpoint="latest",
        max_train_steps=6,
        total_batch_size=16,
        lr_warmup_steps=2,
        checkpointing_steps=3,
        num_sample_images=2,
        ddpm_num_inference_steps=2,
        eval_num_images=2,
        eval_num_evaluations=2,
    )
)
assert trainer.accelerator.num_processes == 2
assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
print("started at update", trainer.step)
trainer.train()
