"""Pushes folders to the Hub that the environment names, all at once: jobs as JSON on stdin, results on stdout.

Only with the argument `open` they are opened first, which takes seconds; everything else does without torch.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from ddpm_hf.hub import publish as hub
from ddpm_hf.hub.publish import Push, quiet_client


def run(job: dict) -> dict:
    lines: list[str] = []
    try:
        return {"url": Push(**job).run(lines.append), "lines": lines}
    except (ValueError, OSError) as error:
        return {"error": str(error), "kind": type(error).__name__, "lines": lines}


if __name__ == "__main__":
    quiet_client()
    if not (opening := sys.argv[1:] == ["open"]):
        hub.check_opens = lambda *_: None
    jobs = json.load(sys.stdin)
    with ThreadPoolExecutor(len(jobs)) as pool:
        print(json.dumps(list(pool.map(run, jobs))))
    if not opening and (heavy := [name for name in ("torch", "diffusers") if name in sys.modules]):
        sys.exit(f"a push imported {heavy}")
