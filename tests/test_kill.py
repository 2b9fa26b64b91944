"""Runs that are killed at any moment end in the same bits, and lose no more than one checkpoint interval."""

import json
import os
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("driver_kill.py")
# More than a test run has time for: DDPM_HF_KILLS=20 python -m pytest tests/test_kill.py
KILLS = int(os.environ.get("DDPM_HF_KILLS", "6"))


def drive(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, str(DRIVER), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kill_9_at_random_moments(tmp_path):
    result = drive(str(tmp_path), "random", str(KILLS))
    print(result)
    assert len(result["killed_at"]) == KILLS
    assert len(set(result["killed_at"])) > 1
    assert result["most_repeated"] <= 3
    assert result["equal"]
    assert result["same_files"]


def test_kill_9_at_every_step_of_a_checkpoint_s_write(tmp_path):
    result = drive(str(tmp_path), "writes")
    print(result)
    assert result["kills"] >= 10
    assert result["kept"] == [3, 6]  # before the rename the last checkpoint, after it the new one
