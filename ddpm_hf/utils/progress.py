"""Progress bars."""

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
