"""Pushing during training: in a thread, one push at a time, of snapshots; training never waits for it."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from .files import check_opens, make_snapshot
from .publish import Push, quiet_client


class BackgroundPush:
    """Pushes a run's folder again and again, always its newest state.

    While one push is under way, the next snapshot waits for it; a newer one takes its place. The thread is a daemon:
    Python does not wait for it when the run ends, as it would for those of `HfApi(...).run_as_future`.

    Args:
        push: What goes where; its token must be known.
        log: Takes lines for the user, in the thread that calls the methods.
    """

    def __init__(self, push: Push, log: Callable[[str], None]):
        self.push, self.log = push, log
        self._current: _PushThread | None = None
        self._waiting: tuple[Path, str] | None = None
        self._failed = False
        quiet_client()

    def offer(self, commit_message: str) -> None:
        """Push the folder as it is now; returns at once. A failure is logged and stops nothing."""
        folder = Path(self.push.folder)
        snapshot = None
        try:
            snapshot = make_snapshot(folder, self.push.token)
            check_opens(snapshot, folder)
        except (OSError, ValueError) as error:
            if snapshot is not None:
                shutil.rmtree(snapshot, ignore_errors=True)
            self._log_failure(str(error))
            return
        self._drop_waiting()
        self._waiting = (snapshot, commit_message)
        self.poll()

    def poll(self) -> None:
        """Log how the last push ended, if it did, and start the one that waits."""
        if self._current is not None:
            if self._current.is_alive():
                return
            for line in self._current.lines:
                self.log(line)
            self._failed = False
            if self._current.failure is not None:
                self._log_failure(self._current.failure)
            self._current = None
        if self._waiting is not None:
            self._current = _PushThread(self.push, *self._waiting)
            self._waiting = None
            self._current.start()

    def finish(self) -> bool:
        """Wait for what is still to be pushed.

        Returns:
            Whether the last push succeeded.

        Raises:
            KeyboardInterrupt: The user does not want to wait; the command that finishes the push is logged.
        """
        try:
            while self._current is not None:
                self.log(f"waiting for the push to {self.push.repo_id}")
                self._current.join()
                self.poll()
        finally:
            self.stop()
        return not self._failed

    def stop(self) -> None:
        """Give up a push that is still under way, and log how to finish it."""
        self.poll()
        if self._current is not None:
            shutil.rmtree(self._current.snapshot, ignore_errors=True)
            self._current = None
            self._drop_waiting()
            self._log_failure("the run ended first")

    def _drop_waiting(self) -> None:
        if self._waiting is not None:
            shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = None

    def _log_failure(self, why: str) -> None:
        self._failed = True
        self.log(f"not pushed ({why}); nothing is lost, and this finishes it: {self.push.command}")


class _PushThread(threading.Thread):
    """One push of a snapshot, which it removes.

    Attributes:
        lines: For the user.
        failure: Why nothing was pushed.
    """

    def __init__(self, push: Push, snapshot: Path, commit_message: str):
        super().__init__(name=f"push to {push.repo_id}", daemon=True)
        self.push, self.snapshot = dataclasses.replace(push, commit_message=commit_message), snapshot
        self.lines: list[str] = []
        self.failure: str | None = None

    def run(self) -> None:
        try:
            self.push.push_snapshot(self.snapshot, self.lines.append)
        except ValueError as error:  # a `PushError`, or another sentence for users
            self.failure = " ".join(str(error).split())
        except BaseException as error:  # a fault of the client's: the training goes on
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        finally:
            shutil.rmtree(self.snapshot, ignore_errors=True)
