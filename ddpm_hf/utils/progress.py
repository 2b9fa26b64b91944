"""Progress bars."""

from typing import Any

from tqdm.auto import tqdm


class _Bar(tqdm):
    def update(self, n: float | None = 1) -> bool | None:
        n = 1 if n is None else n
        if self.total and abs(self.total - self.n - n) < 1e-6:  # parts of images add up to a whole, but for rounding
            n = self.total - self.n
        return super().update(n)


def progress_bar(total: float, desc: str, unit: str = "image", show: bool = True, **options: Any) -> Any:
    """Return a bar of what is done, how fast, and the time that is left; a step of many may be a part of an image.

    Beneath another bar it disappears at its end. `options` are tqdm's.
    """
    form = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return _Bar(total=total, desc=desc, unit=unit, disable=not show, bar_format=form, **{"leave": None, **options})
