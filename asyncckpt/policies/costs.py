"""What saves cost training: an estimate from the times of training steps, with and without a save beside them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from asyncckpt.model import SaveStats
from asyncckpt.policies.moment import Costs

__all__ = ["CostMeter"]

_NUM_STEPS = 65
_WEIGHT = 0.5
_LARGEST_CHANGE = 2.0
_SMALLEST_S = 1e-6


@dataclass(slots=True)
class _Window:
    """Steps from the begin of a save until no save was in flight any more."""

    num_steps: int = 0
    seconds: float = 0.0


class CostMeter:
    """Estimates `Costs`. Deterministic: it reads no clock, every time is told to it.

    A save costs the time it blocks training and the time by which it makes steps slower while it is
    written. Nobody can measure the second within one step, so steps are compared: the sum of those beside
    a save, less as many medians of the latest 65 steps beside none. The median, since a loop that now and
    then evaluates or waits for data must not make all its steps look slow; the sum, since what a save does
    to single steps is what it costs. The result is never less than the blocked time, which is known exactly.

    Estimates are averages with weights that halve from save to save, and each moves by a factor of at
    most two per save: one evaluation beside a save must not double what is known ten times over.
    """

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._alone_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._window = _Window()
        self._costs: Costs | None = None

    @property
    def costs(self) -> Costs | None:
        """The estimate; ``None`` before the first save."""
        return self._costs

    def observe(self, now_s: float, in_flight: bool, is_step: bool = True) -> None:
        """A training step ended.

        Args:
            now_s: when.
            in_flight: whether any save was in flight at any time since the last observation.
            is_step: False: nothing was trained since then, so that any time it took was that of a save.
        """
        if self._last_s is not None:
            seconds = now_s - self._last_s
            if in_flight:
                self._window.num_steps += is_step
                self._window.seconds += seconds
            elif is_step:
                self._alone_s.append(seconds)
        self._last_s = now_s

    def skip(self, now_s: float) -> None:
        """What happened since the last observation was no training step (a validation, a restore)."""
        self._last_s = now_s

    def add_saves(self, saves: Sequence[SaveStats]) -> None:
        """These saves, all since the last call, have become durable, and none is in flight any more.

        With none (all have failed) the steps beside them are dropped: what they show is the cost of no save.
        """
        window, self._window = self._window, _Window()
        if not saves:
            return
        step_s = statistics.median(self._alone_s) if self._alone_s else 0.0
        slowed_s = window.seconds - window.num_steps * step_s if self._alone_s else 0.0
        cost_s = max(sum(save.blocked_s for save in saves), slowed_s) / len(saves)
        durable_s = max(save.durable_s for save in saves)
        before = self._costs
        self._costs = Costs(
            num_saves=len(saves) + (before.num_saves if before else 0),
            cost_s=_smoothed(before.cost_s if before else None, cost_s),
            durable_s=_smoothed(before.durable_s if before else None, durable_s),
            step_s=step_s,
        )

    def __repr__(self) -> str:
        return f"<CostMeter {self._costs!r}, {self._window.num_steps} steps beside a save>"


def _smoothed(before: float | None, measured: float) -> float:
    measured = max(measured, _SMALLEST_S)  # from zero no factor leads anywhere
    if before is None:
        return measured
    value = before + _WEIGHT * (measured - before)
    return min(max(value, before / _LARGEST_CHANGE), before * _LARGEST_CHANGE)
