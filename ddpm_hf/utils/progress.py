"""Progress bars."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm


class _Bar(tqdm):
    def update(self, n: float = 1) -> Any:
        """Count on, and end at the total, to which parts of images do not sum exactly; tqdm warns of the rest."""
        left = (self.total or 0) - self.n
        return super().update(left if abs(left - n) < 1e-6 else n)


def progress_bar(total: float, desc: str, unit: str = "image", show: bool = True, **options: Any) -> Any:
    """Return a bar of what is done, how fast, and the time that is left; a step of many may be a part of an image.

    Beneath another bar it disappears at its end. `options` are tqdm's.
    """
    form = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return _Bar(total=total, desc=desc, unit=unit, disable=not show, bar_format=form, **{"leave": None, **options})


_showing: ContextVar[bool] = ContextVar("showing", default=False)


@contextmanager
def showing_progress(show: bool) -> Iterator[None]:
    """Let what `in_parts` goes through inside of this block have bars, or not."""
    token = _showing.set(show)
    try:
        yield
    finally:
        _showing.reset(token)


def in_parts(parts: Sequence[Sized], desc: str, unit: str = "image") -> Iterator[Any]:
    """Yield parts of a long computation, with a bar of their lengths if it takes more than two seconds."""
    with progress_bar(sum(map(len, parts)), desc, unit, show=_showing.get(), delay=2, leave=False) as bar:
        for part in parts:
            yield part
            bar.update(len(part))
