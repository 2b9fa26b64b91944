"""Pushing during training: in another process, one at a time, of snapshots; training never waits for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from .files import check_opens, make_snapshot
from .publish import Push


class BackgroundPush:
    """Pushes a run's folder again and again, always its newest state.

    While one push is going on, the next snapshot waits for it; a newer one takes its place. The process that pushes is
    one of its own, so that neither a hanging connection nor a crash in the client can reach the training, and a Ctrl-C
    in the terminal does not reach the push.

    Args:
        push: What goes where; its token must be known.
        say: Takes lines for the user.
    """

    def __init__(self, push: Push, say: Callable[[str], None]):
        self.push, self.say = push, say
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._staging: Path | None = None
        self._waiting: tuple[Path, str] | None = None
        self._failed = False

    def offer(self, commit_message: str) -> None:
        """Push the folder as it is now; returns at once. A failure is told and stops nothing."""
        folder = Path(self.push.folder)
        try:
            staging = make_snapshot(folder, self.push.token)
        except (OSError, ValueError) as error:
            self._tell_failure(str(error))
            return
        try:
            check_opens(staging, folder)  # here, where all that it takes is loaded already
        except ValueError as error:
            shutil.rmtree(staging, ignore_errors=True)
            self._tell_failure(str(error))
            return
        if self._waiting is not None:
            shutil.rmtree(self._waiting[0], ignore_errors=True)
        self._waiting = (staging, commit_message)
        self.poll()

    def poll(self) -> None:
        """Tell how the last push ended, if it did, and start the one that waits."""
        if self._process is not None and self._process.poll() is None:
            return
        self._collect()
        if self._waiting is not None:
            self._start(*self._waiting)
            self._waiting = None

    def finish(self) -> bool:
        """Wait for what is still to be pushed; whether the last push succeeded.

        Raises:
            KeyboardInterrupt: The user does not want to wait; the push is ended, and the command that does it told.
        """
        try:
            while self._process is not None or self._waiting is not None:
                if self._process is not None:
                    self.say(f"waiting for the push to {self.push.repo_id}")
                    self._process.wait()
                self.poll()
        except BaseException:
            self.stop()
            raise
        return not self._failed

    def stop(self) -> None:
        """End a push that is still going on, and say how to finish it."""
        unfinished = self._waiting is not None
        if self._process is not None and self._process.poll() is None:
            unfinished = True
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._collect()
        if self._waiting is not None:
            shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = None
        if unfinished:
            self._tell_failure("the run ended first")

    def _start(self, staging: Path, commit_message: str) -> None:
        job = dataclasses.asdict(self.push) | {"commit_message": commit_message, "staging": str(staging)}
        self._staging = staging
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed when the process has ended)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ddpm_hf.hub"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._clear()
            self._tell_failure(str(error))
            return
        assert self._process.stdin is not None
        # Not on the command line, which everybody on the machine can read.
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(job))
        self._process.stdin = None  # so that communicate() does not look for it

    def _collect(self) -> None:
        """The answer of a process that has ended."""
        if self._process is not None and self._errors is not None:
            output, _ = self._process.communicate()
            try:
                answer = json.loads(output)
            except ValueError:  # it crashed
                self._errors.seek(0)
                said = self._errors.read().strip().splitlines() or [f"exit code {self._process.returncode}"]
                answer = {"pushed": False, "lines": [], "why": said[-1]}
            self._process = None
            self._failed = not answer["pushed"]
            for line in answer["lines"]:
                self.say(line)
            if self._failed:
                self._tell_failure(answer["why"])
        self._clear()

    def _clear(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        if self._errors is not None:
            self._errors.close()
        self._staging = self._errors = None

    def _tell_failure(self, why: str) -> None:
        self._failed = True
        self.say(f"not pushed ({why}); nothing is lost, and this finishes it: {self.push.command}")
