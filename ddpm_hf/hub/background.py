"""Pushing during training: in a thread, one push at a time, of snapshots; training never waits for it."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .files import check_opens, make_snapshot
from .publish import Push, quiet_client

# Seconds that the end of a run waits for its last push; one that hangs for longer is given up.
MOST_WAIT = 1800.0


class BackgroundPush:
    """Pushes a run's folder again and again, always its newest state.

    While one push is under way, the next snapshot waits for it; a newer one takes its place. The thread is a daemon:
    Python does not wait for it when the run ends, as it would for those of `HfApi.run_as_future`. The token of `push`
    must be known; `log` takes lines for the user, in the thread that calls the methods.
    """

    def __init__(self, push: Push, log: Callable[[str], None]):
        self.push, self.log = push, log
        self._thread: threading.Thread | None = None
        self._snapshots: list[tuple[Path, str]] = []  # with their commit's message: the one under way, the next one
        self._lines: list[str] = []  # what the thread has for the user,
        self._errors: list[str] = []  # and why it pushed nothing
        self._failed = False
        quiet_client()

    def offer(self, commit_message: str) -> None:
        """Push the folder as it is now; returns at once. A failure is logged and stops nothing."""
        folder, snapshot = Path(self.push.folder), None
        try:
            snapshot = make_snapshot(folder, self.push.token)
            check_opens(snapshot, folder)
        except (OSError, ValueError) as error:
            if snapshot is not None:
                shutil.rmtree(snapshot, ignore_errors=True)
            self._log_failure(str(error))
            return
        self._remove_snapshots(1)
        self._snapshots.append((snapshot, commit_message))
        self.poll()

    def poll(self) -> None:
        """Log how the last push ended, if it did, and start the one that waits."""
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self._thread = None
            self._remove_snapshots(0, 1)
            self._failed = False
            for line in self._lines:
                self.log(line)
            for why in self._errors:
                self._log_failure(why)
        if self._snapshots:
            self._lines, self._errors = [], []
            self._thread = threading.Thread(target=self._push, args=self._snapshots[0], daemon=True)
            self._thread.start()

    def _push(self, snapshot: Path, commit_message: str) -> None:
        lines, errors = self._lines, self._errors
        try:
            dataclasses.replace(self.push, commit_message=commit_message).push_snapshot(snapshot, lines.append)
        except BaseException as error:  # a fault of the client stops no training
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            errors.append(kind + " ".join(str(error).split()))

    def finish(self) -> bool:
        """Wait for what is still to be pushed, up to `MOST_WAIT`, and return whether the last push succeeded."""
        end = time.monotonic() + MOST_WAIT
        while self._thread is not None:
            self.log(f"waiting for the push to {self.push.repo_id}")
            self._thread.join(max(0.0, end - time.monotonic()))
            if self._thread.is_alive():
                self.stop()
            self.poll()
        return not self._failed

    def stop(self) -> None:
        """Give up a push that is under way or waits, and log the command that finishes it."""
        self.poll()
        if self._thread is not None:
            self._thread = None
            self._remove_snapshots(0)
            self._log_failure("the run ended first")

    def _remove_snapshots(self, start: int, stop: int | None = None) -> None:
        for snapshot, _ in self._snapshots[start:stop]:
            shutil.rmtree(snapshot, ignore_errors=True)
        del self._snapshots[start:stop]

    def _log_failure(self, why: str) -> None:
        self._failed = True
        self.log(f"not pushed ({why}); nothing is lost, and this finishes it: {self.push.command}")
