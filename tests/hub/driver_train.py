"""Trains several times in one process: lists of `ddpm-hf train` arguments as JSON on stdin; output on stdout."""

import contextlib
import io
import json
import sys

from ddpm_hf import cli


def run(arguments: list[str]) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as written, contextlib.redirect_stderr(written):
        code = cli.main(["train", *arguments])
    return {"code": code, "written": written.getvalue()}


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
