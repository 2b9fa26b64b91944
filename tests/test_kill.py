"""Runs that are killed at any moment end in the same bits, and lose no more than one checkpoint interval."""

import json
import os
from pathlib import Path

import pytest
from programs import run_program

DRIVER = Path(__file__).with_name("driver_kill.py")
# More than a test run has time for: DDPM_HF_KILLS=20 python -m pytest tests/test_kill.py
KILLS = int(os.environ.get("DDPM_HF_KILLS", "6"))


def drive(*arguments: str) -> dict:
    done = run_program(DRIVER, *arguments, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


ALL = {"channels_last": True, "mixed_precision": "bf16", "train_batch_size": 4, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        (KILLS, {}),
        (max(2, KILLS // 2), {**ALL, "class_conditional": True, "class_dropout": 0.3, "max_train_steps": 18}),
    ],
    ids=["plain", "modes"],
)
def test_kill_9_at_random_moments(tmp_path, kills, settings):
    result = drive(str(tmp_path), "random", str(kills), json.dumps(settings))
    print(result)
    assert len(result["killed_at"]) == kills
    assert kills < 6 or len(set(result["killed_at"])) > 1
    assert result["most_repeated"] <= 3
    assert result["equal"]
    assert result["same_files"]


def test_kill_9_at_every_step_of_a_checkpoint_s_write(tmp_path):
    result = drive(str(tmp_path), "writes")
    print(result)
    assert result["kills"] >= 10
    assert result["kept"] == [3, 6]  # before the rename the last checkpoint, after it the new one


def test_a_killed_compiled_run_resumes_in_a_new_process(tmp_path):
    """The default backend: the whole run compiles, the others find what it has compiled."""
    settings = {"compile": True, "channels_last": True, "mixed_precision": "bf16", "train_batch_size": 4}
    result = drive(str(tmp_path), "compiled", json.dumps({**settings, "max_train_steps": 6}))
    assert result == {"kept": 3, "compiled_once": True, "equal": True}
