"""Run by tests: trains in child processes that are killed (SIGKILL), resumes, and reports what was found, as JSON.

usage: driver_kill.py FOLDER random KILLS SETTINGS     kill at random moments of a run with these settings (JSON)
       driver_kill.py FOLDER writes                    kill at every system call of a checkpoint's write
       driver_kill.py FOLDER compiled SETTINGS         kill a run whose network is compiled, a tiny one

This process forks, since a child that starts from nothing takes ten seconds to import. It never computes anything
itself, so that the children's PyTorch is as fresh as after a start.
"""

import dataclasses
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import torch._inductor.config as inductor

import ddpm_hf.pipelines.checkpoints as checkpoints
import ddpm_hf.presets as presets
import ddpm_hf.utils.files as files_module
from ddpm_hf import Trainer, TrainingConfig

INTERVAL = 3
settings = {"max_train_steps": 40}  # and those of the command line
digits = presets.PRESETS["digits"]
unet = {**digits.unet, "block_out_channels": (8, 16), "dropout": 0.1}
presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=unet)}
reached = mmap.mmap(-1, 8)  # shared with the children: the update that was last finished


def train(folder: Path, before=lambda trainer: None) -> None:
    """A child's whole life."""
    os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    config = TrainingConfig(
        preset="digits",
        output_dir=str(folder),
        resume_from_checkpoint="latest",
        total_batch_size=8,
        checkpointing_steps=INTERVAL,
        checkpoints_total_limit=2,
        num_sample_images=2,
        ddpm_num_inference_steps=2,
        eval_num_images=2,
        eval_num_evaluations=2,
        **settings,
    )
    trainer = Trainer(config)
    before(trainer)
    update = trainer._update

    def noted(step):
        result = update(step)
        reached[:] = struct.pack("q", step + 1)
        return result

    trainer._update = noted
    trainer.train()


def start(*arguments) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def run_to_the_end(folder: Path) -> None:
    assert os.waitpid(start(folder), 0)[1] == 0, folder.with_suffix(".log").read_text()[-2000:]


def newest(folder: Path) -> int:
    """The update of the checkpoint that a run would resume from; raises if there is a damaged one."""
    found = checkpoints.list_checkpoints(folder)
    for path in found:
        checkpoints.load_checkpoint(path)
    return int(found[-1].name.split("-")[1]) if found else 0


def final_tensors_equal(a: Path, b: Path) -> bool:
    one, two = (checkpoints.load_checkpoint(path / f"checkpoint-{settings['max_train_steps']}")[0] for path in (a, b))
    return all(
        one[part].keys() == two[part].keys() and all(one[part][k].equal(two[part][k]) for k in one[part])
        for part in ("model", "ema", "optimizer")
    )


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def random_kills(folder: Path, count: int) -> dict:
    began = time.monotonic()
    run_to_the_end(folder / "whole")
    duration = time.monotonic() - began
    moments = random.Random(0)
    killed_at, repeated, in_writes = [], [], 0
    run = folder / "run"
    while len(killed_at) < count:
        reached[:] = struct.pack("q", newest(run))
        child = start(run)
        time.sleep(moments.uniform(0, duration / 4))  # a moment like any other; nothing is waited for
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:  # it had finished: begin again, from an empty folder
            shutil.rmtree(run)
            continue
        at = struct.unpack("q", reached[:])[0]
        killed_at.append(at)
        repeated.append(at - newest(run))
        in_writes += bool(list(run.glob(".*.partial")))
    run_to_the_end(run)
    return {
        "killed_at": killed_at,
        "most_repeated": max(repeated),
        "kills_during_a_write": in_writes,
        "equal": final_tensors_equal(folder / "whole", run),
        "same_files": files(folder / "whole") == files(run),
    }


def kills_in_writes(folder: Path) -> dict:
    """SIGKILL at the n-th fsync, rename or removal after update 6, for every n that there is."""
    run_to_the_end(folder / "whole")
    kept = []
    for n in range(1000):
        run = folder / f"run-{n}"

        def armed(trainer, n=n):
            calls = 0

            def counted(function):
                def call(*arguments, **options):
                    nonlocal calls
                    if trainer.step == 6:
                        calls += 1
                        if calls > n:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)

                return call

            for name in ("fsync", "rename", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            checkpoints.save_file = counted(checkpoints.save_file)
            files_module.shutil.rmtree = counted(files_module.shutil.rmtree)

        status = os.waitpid(start(run, armed), 0)[1]
        if status == 0:
            break  # there is no n-th call
        assert status == signal.SIGKILL, run.with_suffix(".log").read_text()[-2000:]
        kept.append(newest(run))
        run_to_the_end(run)
        if not final_tensors_equal(folder / "whole", run) or files(folder / "whole") != files(run):
            return {"broken_at": n}
        shutil.rmtree(run)
    return {"kills": n, "kept": sorted(set(kept))}


def kill_a_compiled_run(folder: Path) -> dict:
    """SIGKILL after update 4, once; how often anything was compiled is told by the cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    inductor.cpp.simdlen = 0  # a C++ compiler takes twice as long for vectorized code
    small = {**unet, "block_out_channels": (8,), "layers_per_block": 0, "mid_block_type": None}
    small |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    presets.PRESETS = {**presets.PRESETS, "digits": dataclasses.replace(digits, unet=small)}
    run_to_the_end(folder / "whole")
    kernels = files(folder / "cache" / "fxgraph")
    run = folder / "run"

    def armed(trainer):
        step = trainer.update.apply
        trainer.update.apply = lambda: os.kill(os.getpid(), signal.SIGKILL) if trainer.step == 4 else step()

    assert os.waitpid(start(run, armed), 0)[1] == signal.SIGKILL
    kept = newest(run)
    run_to_the_end(run)
    return {
        "kept": kept,
        "compiled_once": bool(kernels) and files(folder / "cache" / "fxgraph") == kernels,
        "equal": final_tensors_equal(folder / "whole", run),
    }


folder, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "writes":
    settings["max_train_steps"] = 9  # the interval before the write that is interrupted, and the one after it
    result = kills_in_writes(folder)
else:
    settings |= json.loads(sys.argv[-1])
    result = random_kills(folder, int(sys.argv[3])) if mode == "random" else kill_a_compiled_run(folder)
print(json.dumps(result))
