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
_NUM_STEPS_AFTER = 20
_NUM_STEPS_BETWEEN = 5
_WEIGHT = 0.5
_LARGEST_CHANGE = 2.0
_SMALLEST_S = 1e-6


@dataclass(slots=True)
class _Window:
    """Steps in a row."""

    num_steps: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, num_steps: int) -> None:
        self.num_steps += num_steps
        self.seconds += seconds


class CostMeter:
    """Estimates `Costs`. Deterministic: it reads no clock, every time is told to it.

    A save costs the time it blocks training and the time by which it makes steps slower while it is
    written. Nobody can measure the second within one step, so steps are compared: the sum of those beside
    a save, less as many medians of the latest 65 steps beside none. The median, since a loop that now and
    then evaluates or waits for data must not make all its steps look slow; the sum, since what a save does
    to single steps is what it costs. The result is never less than the blocked time, which is known exactly.

    Steps right after a save are slower, too: old checkpoints are being removed, caches are cold. So up to 20
    of them count as beside it, over at most as long as the save took, and until the next one begins.

    Estimates are averages with weights that halve from save to save, and each moves by a factor of at
    most two per save: one evaluation beside a save must not double what is known ten times over.
    """

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._alone_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._beside = _Window()  # from the begin of a save until none was in flight any more
        self._after = _Window()  # since then
        self._saves: list[SaveStats] = []  # the durable ones of these windows
        self._num_alone = 0  # steps beside no save since the latest of them
        self._costs: Costs | None = None

    @property
    def costs(self) -> Costs | None:
        """The estimate; ``None`` before the first save was measured."""
        return self._costs

    @property
    def is_measuring(self) -> bool:
        """Whether a save now could not be measured: there would be too few steps beside none to compare with.

        Saves that close together would leave an early error in the median there for good.
        """
        return bool(self._saves) or self._num_alone < _NUM_STEPS_BETWEEN

    def observe(self, now_s: float, in_flight: bool, is_step: bool = True) -> None:
        """A training step ended.

        Args:
            now_s: when.
            in_flight: whether any save was in flight at any time since the last observation.
            is_step: False: nothing was trained since then, so that any time it took was that of a save.
        """
        last_s, self._last_s = self._last_s, now_s
        if last_s is None:
            return
        if in_flight:
            if self._saves:  # another one has begun
                self._measure()
            self._beside.add(now_s - last_s, int(is_step))
            self._num_alone = 0
        elif self._saves:
            self._after.add(now_s - last_s, int(is_step))
            if self._after.num_steps >= _NUM_STEPS_AFTER or self._after.seconds >= self._beside.seconds:
                self._measure()
        elif is_step:
            self._alone_s.append(now_s - last_s)
            self._num_alone += 1

    def skip(self, now_s: float) -> None:
        """What happened since the last observation was no training step (a validation, a restore)."""
        self._last_s = now_s

    def add_saves(self, saves: Sequence[SaveStats]) -> None:
        """These saves have become durable since the last call, and none is in flight any more.

        With none (all have failed) the steps beside them are dropped: what they show is the cost of no save.
        """
        self._saves += saves
        if not self._saves:
            self._beside = _Window()

    def _measure(self) -> None:
        beside, after, saves, before = self._beside, self._after, self._saves, self._costs
        self._beside, self._after, self._saves = _Window(), _Window(), []
        step_s = statistics.median(self._alone_s) if self._alone_s else 0.0
        blocked_s = sum(save.blocked_s for save in saves)
        slowed_s = beside.seconds + after.seconds - (beside.num_steps + after.num_steps) * step_s
        self._costs = Costs(
            num_saves=len(saves) + (before.num_saves if before else 0),
            cost_s=_smoothed(
                before.cost_s if before else None,
                (max(blocked_s, slowed_s) if self._alone_s else blocked_s) / len(saves),
            ),
            durable_s=_smoothed(before.durable_s if before else None, max(save.durable_s for save in saves)),
            step_s=step_s,
        )

    def __repr__(self) -> str:
        return f"<CostMeter {self._costs!r}, {self._beside.num_steps} steps beside a save>"


def _smoothed(before: float | None, measured: float) -> float:
    measured = max(measured, _SMALLEST_S)  # from zero no factor leads anywhere
    if before is None:
        return measured
    value = before + _WEIGHT * (measured - before)
    return min(max(value, before / _LARGEST_CHANGE), before * _LARGEST_CHANGE)
