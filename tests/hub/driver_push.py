"""Pushes folders to the Hub that the environment names, all at once: jobs as JSON on stdin, results on stdout."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from ddpm_hf.hub import Push, quiet_client


def run(job: dict) -> dict:
    lines: list[str] = []
    try:
        return {"url": Push(**job).run(lines.append), "lines": lines}
    except (ValueError, OSError) as error:
        return {"error": str(error), "kind": type(error).__name__, "lines": lines}


if __name__ == "__main__":
    quiet_client()
    jobs = json.load(sys.stdin)
    with ThreadPoolExecutor(len(jobs)) as pool:
        print(json.dumps(list(pool.map(run, jobs))))
