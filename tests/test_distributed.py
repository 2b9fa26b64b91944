"""Several processes do what one does: the same images, t and noise, the same losses and numbers."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline

DRIVER = Path(__file__).with_name("driver_losses.py")
SETTINGS = {
    "preset": "digits",
    "max_train_steps": 12,
    "total_batch_size": 16,
    "lr_warmup_steps": 2,
    "lr_scheduler": "constant",
    "num_sample_images": 5,
    "ddpm_num_inference_steps": 3,
    "sampler": "ddim",
    "eval_num_images": 5,
    "eval_num_evaluations": 4,
}


def launch(folder: Path, processes: int, **settings) -> dict:
    settings = {**SETTINGS, "output_dir": str(folder / "run"), **settings}
    folder.mkdir()
    # --multi_gpu starts the processes, GPUs or not; --cpu would start a single one (without MPI).
    flags = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", str(processes)]
    command += [str(DRIVER), str(folder / "out.json"), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DRIVER.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def test_one_process_accumulation_and_two_processes_are_the_same_run(tmp_path):
    whole = launch(tmp_path / "whole", 1)
    cut = launch(tmp_path / "cut", 1, train_batch_size=8)
    two = launch(tmp_path / "two", 2)
    assert (whole["processes"], two["processes"]) == (1, 2)
    assert whole["losses"][0] - whole["losses"][-1] > 0.1  # it learns, so the trajectory is more than its start
    for other in (cut, two):
        assert np.abs(np.subtract(whole["losses"], other["losses"])).max() < 1e-5
        assert np.abs(np.subtract(whole["weights"], other["weights"])).max() < 1e-3
        assert other["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], abs=1e-4)
    assert (tmp_path / "two" / "run" / "samples.png").is_file()


def test_sharded_weights_are_saved_whole_and_resume_to_the_same_bits(tmp_path):
    assert "started at update 0" in run_sharded(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert "started at update 3" in run_sharded(tmp_path / "resumed")
    for part in ("model", "ema", "optimizer"):
        whole, resumed = (
            load_file(tmp_path / run / "checkpoint-6" / f"{part}.safetensors") for run in ("whole", "resumed")
        )
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), part
    # And what was saved are whole tensors, the same as of a run without shards.
    plain = launch(tmp_path / "plain", 1, max_train_steps=6, lr_scheduler="cosine")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "whole")
    weights = torch.cat([p.flatten() for p in pipe.unet.parameters()])
    assert np.abs(weights.detach().numpy() - np.array(plain["weights"])).max() < 1e-4


def run_sharded(output_dir: Path) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    driver = [str(DRIVER.with_name("driver_sharded.py")), str(output_dir)]
    command = [*torchrun, "--master_port", str(free_port()), *driver]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DRIVER.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
