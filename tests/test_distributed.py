"""Several processes do what one does: the same images, t and noise, the same losses and numbers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from accelerate.commands import launch as launch_command
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from programs import free_port, run_program, run_ranks
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline
from ddpm_hf.cli import parse_training_config
from ddpm_hf.pipelines.checkpoints import save_checkpoint

DRIVER = Path(__file__).with_name("driver_losses.py")
SETTINGS = {
    "preset": "digits",
    "max_train_steps": 12,
    "total_batch_size": 16,
    "lr_warmup_steps": 2,
    "lr_scheduler": "constant",
    "num_sample_images": 5,
    "ddpm_num_inference_steps": 4,
    "sampler": "ddim",
    "eval_num_images": 5,
    "eval_num_evaluations": 4,
}


TUNED = {"max_train_steps": 3, "init_from": "ddpm_hf/models/digits", "class_conditional": True}


def start(folder: Path, runs: dict[str, dict]) -> list[str]:
    """The program that makes runs with these settings, one after the other, into folders of these names."""
    settings = [{**SETTINGS, "output_dir": str(folder / name), **run} for name, run in runs.items()]
    return [str(DRIVER), str(folder / "out.json"), json.dumps(settings)]


def found(folder: Path, done) -> dict[str, dict]:
    """What those runs found, by name."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """What runs of one process found."""
    folder = tmp_path_factory.mktemp("alone")
    six = {"max_train_steps": 6, "lr_scheduler": "cosine"}
    runs = {"whole": {}, "accumulated": {"train_batch_size": 8}, "six": six, "tuned": TUNED}
    return found(folder, run_program(*start(folder, runs)))


def test_one_process_accumulation_and_two_processes_are_the_same_run(tmp_path, alone):
    whole, accumulated = alone["whole"], alone["accumulated"]
    # --multi_gpu starts the processes, GPUs or not; --cpu would start a single one (without MPI).
    flags = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]
    flags += ["--main_process_port", "0", "--num_processes", "2"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags,
        *start(tmp_path, {"two": {}, "tuned": TUNED}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DRIVER.parent.parent)
    two, tuned = (found(tmp_path, done)[name] for name in ("two", "tuned"))
    assert np.abs(np.subtract(alone["tuned"]["losses"], tuned["losses"])).max() < 1e-5
    assert np.abs(np.subtract(alone["tuned"]["weights"], tuned["weights"])).max() < 1e-3
    assert (whole["processes"], two["processes"]) == (1, 2)
    assert whole["losses"][0] - whole["losses"][-1] > 0.1  # it learns, so the trajectory is more than its start
    for other in (accumulated, two):
        assert np.abs(np.subtract(whole["losses"], other["losses"])).max() < 1e-5
        assert np.abs(np.subtract(whole["weights"], other["weights"])).max() < 1e-3
        assert other["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], abs=1e-4)
    assert (tmp_path / "two" / "samples.png").is_file()


def test_sharded_weights_are_saved_whole_and_resume_to_the_same_bits(tmp_path, alone):
    assert "started at update 0" in ranks(2, "driver_sharded.py", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert "started at update 3" in ranks(2, "driver_sharded.py", tmp_path / "resumed")
    assert same_end(tmp_path / "whole", tmp_path / "resumed")
    for name, value in DDPMPipeline.from_pretrained(tmp_path / "whole" / "checkpoint-6").unet.state_dict().items():
        assert torch.equal(value, DDPMPipeline.from_pretrained(tmp_path / "whole").unet.state_dict()[name])
    # And what was saved are whole tensors, the same as of a run without shards.
    pipe = DDPMPipeline.from_pretrained(tmp_path / "whole")
    weights = torch.cat([p.flatten() for p in pipe.unet.parameters()])
    assert np.abs(weights.detach().numpy() - np.array(alone["six"]["weights"])).max() < 1e-4


def test_three_processes_resume_to_the_same_bits(tmp_path):
    """The sum of three depends on its order, so on the buckets that DDP makes after its first backward pass."""
    ranks(3, "driver_resumed.py", tmp_path)
    assert same_end(tmp_path / "whole", tmp_path / "resumed")
    assert not same_end(tmp_path / "whole", tmp_path / "unsettled")


def ranks(processes: int, driver: str, folder: Path) -> str:
    """What the first of these processes said."""
    ends = run_ranks(*[[str(DRIVER.with_name(driver)), str(folder)]] * processes)
    for end in ends:
        assert end.returncode == 0, end.stderr[-3000:]
    return ends[0].stdout


def same_end(one: Path, other: Path) -> bool:
    """Whether every tensor of two runs' last checkpoints is the same."""
    for part in ("model", "ema", "optimizer"):
        a, b = (load_file(run / "checkpoint-6" / f"{part}.safetensors") for run in (one, other))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True


FLAGS = {**SETTINGS, "max_train_steps": 4, "checkpointing_steps": 2}


def two_machines(*flags: list[str]) -> list[tuple[int | None, str]]:
    """Exit codes and outputs of two processes of one run, each with its own flags."""
    driver = [str(DRIVER.with_name("driver_folders.py"))]
    driver += [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
    return two_processes([*driver, *flags[0]], [*driver, *flags[1]])


def two_processes(*commands: list[str]) -> list[tuple[int | None, str]]:
    """Exit codes and outputs of two processes that belong together."""
    return [(end.returncode, end.stdout + end.stderr) for end in run_ranks(*commands)]


def test_machines_without_a_shared_disk_say_so_instead_of_waiting_for_each_other(tmp_path):
    for step in (2, 4):
        save_checkpoint(tmp_path / "a", step, {"model": {"weight": torch.ones(3)}}, {})
    (tmp_path / "a" / "training_config.yaml").touch()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    damaged = tmp_path / "b" / "checkpoint-4" / "state.json"  # on one machine, which takes the one before
    damaged.write_text(damaged.read_text() + " ")
    flags = [["--output_dir", str(tmp_path / machine), "--resume_from_checkpoint", "latest"] for machine in "ab"]
    sentence = r"error: process 0 has checkpoint-4 \(\w+\), and process 1 has checkpoint-2 \(\w+\); put --output"
    for code, output in two_machines(*flags):
        assert code == 2, output
        assert re.search(sentence, output)


def test_what_fails_on_one_machine_ends_all_with_its_sentence(tmp_path):
    common = ["--output_dir", str(tmp_path / "run")]
    elsewhere = ["--train_data_dir", str(tmp_path / "not-here")]
    (first, said_by_first), (second, said_by_second) = two_machines(common, common + elsewhere)
    assert (first, second) == (2, 2)
    assert re.search("error: process 1 failed: .*not-here", said_by_first)
    assert re.search("error: .*not-here", said_by_second)
    assert "Traceback" not in said_by_first + said_by_second


def test_a_figure_is_drawn_by_one_process_which_waits_for_no_other(tmp_path, small_pipeline):
    """And which makes its network faster by itself, as the others have ended."""
    small_pipeline.save_pretrained(tmp_path / "model")
    command = ["-m", "ddpm_hf.cli", "sample", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "f.png")]
    command += ["--figure", "progressive", "--seeds", "0,1", "--num_inference_steps", "4", "--optimize", "yes"]
    (first, drawn), (second, _) = two_processes(command, command)
    assert (first, second) == (0, 0), drawn
    assert "network: fp32" in drawn
    assert (tmp_path / "f.png").is_file()


def test_processes_wait_longer_than_a_collective_and_what_fails_on_one_fails_on_all(tmp_path):
    driver = [str(DRIVER.with_name("driver_waiting.py")), str(tmp_path)]
    ends = two_processes(driver, driver)
    assert [code for code, _ in ends] == [0, 0], ends
    first, second = (json.loads(next(line for line in out.splitlines() if line[:1] == "{")) for _, out in ends)
    assert first["waited"] == second["waited"] == ["first", "second"]
    assert first["a mistake"] == ["UserError", True, "give another folder"]
    assert second["a mistake"] == ["UserError", True, "process 0 failed: give another folder"]
    assert (first["a disk"][0], second["a disk"][:2]) == ("OSError", ["UserError", True])
    assert (first["a fault"][0], second["a fault"][:2]) == ("ValueError", ["RuntimeError", False])
    assert second["a fault"][2] == "process 0 failed: 5 is not in list"
    for what, words in {"samples": "No space left", "features": "Inception weights are not on this machine"}.items():
        assert first[what][:2] == ["UserError", True]
        assert "process 1 failed" in first[what][2]
        assert words in first[what][2]
        assert words in second[what][2]
    # One warning for each damaged checkpoint, not one from each process.
    assert [out.count("warning:") for _, out in ends] == [2, 0]


CONFIGURATIONS = {  # name: machines, processes on this one, precision
    "one_gpu": (1, 1, "bf16"),
    "multi_gpu": (1, 8, "bf16"),
    "multi_node": (2, 8, "bf16"),
    "fsdp2": (1, 8, "bf16"),
    "two_cpu_processes": (1, 2, "no"),
}


def test_each_accelerate_configuration_has_its_expectation(repository_root):
    files = (repository_root / "examples" / "accelerate").glob("*.yaml")
    assert {path.stem for path in files} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_launches_what_a_configuration_says(name, repository_root):
    """Read by the launcher's own code; then torchrun's reads what the launcher makes of it, short of starting it."""
    machines, processes, precision = CONFIGURATIONS[name]
    path = str(repository_root / "examples" / "accelerate" / f"{name}.yaml")
    assert load_config_from_file(path).num_processes == machines * processes
    flags = ["--config", "examples/configs/digits.yaml", "--output_dir", "runs/here", "--max_train_steps", "7"]
    given = ["--config_file", path, "--main_process_port", str(free_port())]
    arguments = launch_command.launch_command_parser().parse_args([*given, "examples/train.py", *flags])
    arguments, _, _ = launch_command._validate_launch_command(arguments)
    if processes == 1:
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        command = command[command.index("examples/train.py") :]
    else:
        environment = prepare_multi_gpu_env(arguments)
        script = ["--training_script", arguments.training_script]
        script += ["--training_script_args", arguments.training_script_args]
        torchrun = torch.distributed.run
        read, _, command = torchrun.config_from_args(_filter_args(arguments, torchrun.get_args_parser(), script))
        assert (read.min_nodes, read.max_nodes, read.nproc_per_node) == (machines, machines, processes)
        assert command[0] == "-u"
        command = command[1:]
    assert command == ["examples/train.py", *flags]
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    assert environment.get("ACCELERATE_USE_FSDP", "false") == str(name == "fsdp2").lower()
    if name == "fsdp2":  # the first FSDP is refused
        assert environment["FSDP_VERSION"] == "2"
    config = parse_training_config(flags)
    assert (config.preset, config.output_dir, config.max_train_steps) == ("digits", "runs/here", 7)
    assert config.batch_plan(machines * processes)[2] % (machines * processes) == 0
