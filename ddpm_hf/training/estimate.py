"""How long a run will take, measured over its first updates."""

import time
from datetime import datetime, timedelta

from ..utils.text import duration

_SECONDS = 10.0  # of measuring, before an estimate is given


def time_left(seconds: float, updates: int) -> str:
    """Return how long `updates` of so many seconds each take from now on, and when that ends."""
    end = datetime.now() + timedelta(seconds=seconds * updates)
    how_long = f"about {duration(seconds * updates)} for {updates:,} updates"
    when = f"{end:%a %d %b %H:%M}" if seconds * updates < 30 * 86_400 else f"{end:%d %b %Y}"
    return f"{seconds:.3g} s per update: {how_long}, until {when}"


class Pace:
    """Seconds per update between readings of the device; without the first update, which compiles and warms up."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None
        self._done = False

    def restart(self) -> None:
        """Measure from the next reading on, because something else than an update took time."""
        self._start = None

    def estimate(self, step: int, last: int) -> str | None:
        """Return what is left after update `step`, once, when there is enough to tell; the device was just read."""
        now = time.monotonic()
        self._start = self._start or (step, now)
        made, seconds = step - self._start[0], now - self._start[1]
        if self._done or not made or seconds < _SECONDS or step == last:
            return None
        self._done = True
        return f"{time_left(seconds / made, last - step)} (measured over {made}; samples, evaluations come on top)"
