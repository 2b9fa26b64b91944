"""A run, as far as its pushes go: its model changes while an earlier one is still being pushed.

Arguments: the run's folder, and the folders of the models that it publishes one after the other.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import ddpm_hf.pipelines.pipeline_ddpm  # noqa: F401  (which a run has loaded long before it pushes)
from ddpm_hf.hub.background import BackgroundPush
from ddpm_hf.hub.publish import Push

if __name__ == "__main__":
    folder, *versions = (Path(name) for name in sys.argv[1:])
    lines: list[str] = []
    background = BackgroundPush(Push(str(folder), "org/run", token="hf_test_token", attempts=2), lines.append)
    longest = 0.0
    for number, version in enumerate(versions):
        shutil.rmtree(folder / "unet", ignore_errors=True)  # a run replaces its weights, it does not rewrite them
        shutil.copytree(version, folder, dirs_exist_ok=True)
        started = time.monotonic()
        background.offer(f"version {number}")
        longest = max(longest, time.monotonic() - started)
    if "ABANDON_AFTER" in os.environ:
        while not Path(os.environ["ABANDON_AFTER"]).exists():
            time.sleep(0.02)
        background.stop()
        pushed = False
    else:
        pushed = background.finish()
    left = [path.name for path in folder.glob(".push-*")]
    print(json.dumps({"lines": lines, "pushed": pushed, "left": left, "longest": longest}))
