"""`--max_train_minutes`: how many updates fit into a time, and a learning rate that ends with it.

The clock decides the number of updates. It is planned after 3 updates, again when their number has doubled, and later
after every eighth of those that are left, by the speed of the latest ones, and after all that is no update: samples,
numbers, checkpoints. Checkpoints hold the plan; given it, the learning rate is a function of the update alone.
"""

import bisect
import math
import time
from collections.abc import Callable
from typing import Any

from ..presets import Preset
from ..utils.processes import from_first, log
from .configuration import TrainingConfig, TrainingError

clock = time.monotonic

_PLAN_AFTER = 3  # updates of this process; only the third's time counts: those before may compile
_OTHER_FILES = 0.5  # seconds of the card, configurations and the picture's file


class TimeLimit:
    """Plans the last update of a run with `--max_train_minutes`.

    The time is for everything, from the start of the run to its model, samples and numbers. `used` returns the seconds
    that the run has taken, those of the processes that it resumed from included.
    """

    def __init__(self, config: TrainingConfig, recipe: Preset, used: Callable[[], float]):
        assert config.max_train_minutes is not None
        self.minutes, self.used = config.max_train_minutes, used
        self.most, self.warmup, self.decay = recipe.max_train_steps, recipe.lr_warmup_steps, recipe.lr_scheduler
        # Updates between what takes time on the way, by the names of `took`
        intervals = {"grid": config.save_images_steps, "numbers": config.validation_steps}
        intervals |= {"checkpoint": config.checkpointing_steps}
        intervals |= {"push": config.checkpointing_steps if config.push_to_hub else None}
        self._intervals = {name: interval for name, interval in intervals.items() if interval is not None}
        self.last = self.most
        self._from, self._done = self.warmup, 0.0  # the decay had come so far at that update, from 0 to 1
        self.estimated = False
        self._seconds: dict[str, float] = {}  # of each of them, as measured the last time, else as estimated
        self._first, self._next = 0, 1
        self._marks: list[tuple[int, float]] = []  # updates, and the seconds of nothing but them

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        plan = {"last": self.last, "from": self._from, "done": self._done}
        return plan | {"minutes": self.minutes, "max_train_steps": self.most}

    def resume(self, step: int, state: dict[str, Any] | None, before: str | None) -> None:
        """Continue after update `step` by the plan of its checkpoint, which may have been made without a time.

        `before` is the schedule so far: a learning rate that was constant without a time begins to fall here.
        A finished run that gets more minutes, or updates, gets a new plan: its learning rate rises, and falls again.
        """
        state = state or {}
        more = self.minutes > state.get("minutes", math.inf) or self.most > state.get("max_train_steps", math.inf)
        if state and not (more and step >= state["last"]):
            self.last, self._from, self._done = min(state["last"], self.most), state["from"], state["done"]
        elif not state and before == "constant":
            self._from = max(step, self.warmup)
        self._first, self._next = step, step + 1

    def factor(self, step: int) -> float:
        """Return the learning rate after `step` updates, as a share of its peak."""
        return min(1.0, step / max(1, self.warmup)) * self._decayed(self.progress(step))

    def progress(self, step: int) -> float:
        """Return how far the decay has come after `step` updates: 0 until the end of the warm-up, 1 at the last."""
        share = (step - self._from) / max(1, self.last - self._from)
        return self._done + (1 - self._done) * min(1.0, max(0.0, share))

    def _decayed(self, progress: float) -> float:
        if self.decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.decay == "linear" else 1.0

    def is_due(self, step: int) -> bool:
        """Return whether `plan` is due after update `step`; the same in all processes."""
        return step >= self._next

    def plan(self, step: int, others: float) -> None:
        """Plan the last update after update `step`, the device being idle; all processes get the first one's plan.

        `others` are the seconds so far in which no update was made.
        Raises TrainingError: not even the first updates and the end of a new run fit into the time.
        """
        now, made = self.used(), step - self._first
        left = 60 * self.minutes - now - self.writing - self.showing
        self._marks.append((step, now - others))
        rate = self._seconds_per_update(made // 8)
        # A speed is known after `_PLAN_AFTER` updates; before that only whether any time is left matters.
        last = self.last if made < _PLAN_AFTER and left > 0 else step + self._fitting(step, left, rate)
        last = min(self.most, from_first(last))
        if last <= step < self.most and made <= _PLAN_AFTER and not self._first:
            raise TrainingError(self._too_short(now, rate or now / 10))
        if made < _PLAN_AFTER and last > step:
            self._next = step + 1
            return
        if made == _PLAN_AFTER:
            self._announce(last)
        if last != self.last:
            self._done, self._from = self.progress(step), max(step, self.warmup)
            if last <= step and self._done < 0.9:
                log(f"the time is used up after update {step}, {self._done:.0%} of the way of the learning rate")
            self.last = last
        self._next = step + max(1, min(made, (last - step) // 8))

    def _seconds_per_update(self, least: int) -> float:
        """Return the seconds of an update, over at least so many of the latest ones; 0 after the first one."""
        step, seconds = self._marks[-1]
        earlier = [mark for mark in self._marks if mark[0] <= step - max(1, least)]
        then, at = earlier[-1] if earlier else self._marks[0]
        return (seconds - at) / max(1, step - then)

    def _fitting(self, step: int, left: float, rate: float) -> int:
        """Return how many updates after `step` fit into `left` seconds, with all that comes in between."""

        def seconds(count: int) -> float:
            # What is due after update `step` itself is still to come; what is due after the last one is the end's.
            others = 0.0
            for name, interval in self._intervals.items():
                others += ((step + count - 1) // interval - (step - 1) // interval) * self._seconds.get(name, 0.0)
            return count * rate + others

        counts = range(1, self.most - step + 1)
        return bisect.bisect_right(counts, left + 1e-6, key=seconds)

    @property
    def writing(self) -> float:
        """Seconds of the files after the last update: a checkpoint, a quarter of it for the model, and others."""
        return 1.5 * self._seconds.get("checkpoint", 0.0) + _OTHER_FILES

    @property
    def showing(self) -> float:
        """Seconds of samples and numbers after the last update."""
        return self._seconds.get("grid", 0.0) + self._seconds.get("numbers", 0.0)

    def expect(self, seconds: dict[str, float]) -> None:
        """Take into account how long things will take, by their names; what was measured remains."""
        self._seconds, self.estimated = {**seconds, **self._seconds}, True

    def took(self, name: str, step: int, seconds: float) -> None:
        """Take into account how long something has taken after update `step`: plan again soon."""
        self._seconds[name], self._next = seconds, min(self._next, step + 1)

    def _announce(self, last: int) -> None:
        end = f"{self.writing:.0f} s to write the model and {self.showing:.0f} s for samples and numbers"
        log(f"{self.minutes:g} minutes are about {last} updates; kept for the end: {end}")
        if self.warmup > last // 2:
            log(f"the warm-up of {self.warmup} updates takes most of them; give a smaller --lr_warmup_steps")

    def _too_short(self, used: float, rate: float) -> str:
        need = math.ceil((used + 10 * rate + self.writing + self.showing) / 6) / 10
        took = f"the start and the first updates took {used:.0f} s, writing the model takes about {self.writing:.0f} s"
        then = f"and samples and numbers about {self.showing:.0f} s"
        how = f"give {need:g} or more, or fewer --ddpm_num_inference_steps, --num_sample_images or --eval_num_samples"
        return f"--max_train_minutes {self.minutes:g} is too short: {took}, {then}; {how}"
