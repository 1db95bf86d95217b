"""Saving as often as what saves cost allows, or as failures make worth while."""

from __future__ import annotations

import math
from dataclasses import dataclass

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import IntervalReport
from asyncckpt.policies.checks import require_duration
from asyncckpt.policies.moment import Costs, Moment
from asyncckpt.policies.when import When

__all__ = ["Adaptive", "young_daly_interval"]

# What is measured is noisy: aiming at the cap itself would exceed it half of the time.
_HEADROOM = 0.8
# Before anything is measured: an interval that wastes little whatever saves turn out to cost. One of x times the
# optimum wastes (1 - x) ** 2 saves per start, so a very early first save would cost a whole one at every restart.
_FIRST_BY_MTBF = 1 / 20
_LONGEST_FIRST_S = 300.0


def young_daly_interval(cost_s: float, mtbf_s: float) -> float:
    """The time between saves that loses least to saving and to failures together: ``sqrt(2 * cost * mtbf)``.

    First order, for a cost well below *mtbf_s*: J. W. Young, A first order approximation to the optimum
    checkpoint interval, Communications of the ACM 17(9), 1974, pp. 530-531. Its next terms (J. T. Daly, A
    higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
    Systems 22(3), 2006, pp. 303-312) change it by a third of the cost at most. How long a save takes until
    it is durable does not move the optimum: a failure loses that much more whatever the interval.
    """
    return math.sqrt(2.0 * cost_s * mtbf_s)


@dataclass(frozen=True, slots=True)
class Adaptive(When):
    """Due at an interval that follows from what saves are measured to cost.

    With *mtbf* at the Young-Daly optimum, without it as often as the cap allows. In both cases never so often
    that saving takes more than *max_overhead* of the time (it aims at four fifths of that), that a save is
    still being written or fewer than five steps went by beside none (its cost could not be told), or more
    often than *shortest_s*. The interval is a function of the smoothed costs alone, each of which moves by a
    factor of at most two per save, and so does the interval.

    Time is counted from the last save of any kind. The first save of a run, which tells what saves cost, is due after
    *shortest_s*, with *mtbf* after a twentieth of that if this is longer, but after 5 minutes at the latest.

    Attributes:
        max_overhead: the largest part of the training time that saving may take, between 0 and 1.
        mtbf: mean time between failures of the job, in seconds; ``None`` when it is not known.
        shortest_s: lower bound of the interval in seconds.
    """

    max_overhead: float = 0.01
    mtbf: float | None = None
    shortest_s: float = 30.0

    def __post_init__(self) -> None:
        require_duration("Adaptive.max_overhead", self.max_overhead)
        if self.max_overhead >= 1:
            raise InvalidOptionError(f"Adaptive.max_overhead is a fraction below 1, not {self.max_overhead!r}")
        if self.mtbf is not None:
            require_duration("Adaptive.mtbf", self.mtbf)
        require_duration("Adaptive.shortest_s", self.shortest_s)

    def due(self, moment: Moment) -> bool:
        return not moment.in_flight and moment.now_s - moment.last_s >= self.plan(moment.costs).interval_s

    def explain(self, moment: Moment) -> IntervalReport | None:
        return self.plan(moment.costs)

    def plan(self, costs: Costs | None) -> IntervalReport:
        """The interval for these costs, and what it follows from."""
        if costs is None:
            return IntervalReport(self._first_s, reason="no save has been measured yet; the first one will be")
        candidates = [
            (self.shortest_s, "the lower bound shortest_s"),
            (costs.durable_s, "a save must be durable before the next begins"),
            (
                costs.cost_s / (_HEADROOM * self.max_overhead),
                f"{costs.cost_s:.3g} s per save may be at most {self.max_overhead:.2%} of the time",
            ),
        ]
        if self.mtbf is not None:
            optimum = young_daly_interval(costs.cost_s, self.mtbf)
            candidates.append((optimum, f"sqrt(2 * {costs.cost_s:.3g} s * {self.mtbf:.6g} s) of Young and Daly"))
        interval_s, reason = max(candidates, key=lambda candidate: candidate[0])
        return IntervalReport(interval_s, costs.cost_s, costs.durable_s, costs.cost_s / interval_s, reason)

    @property
    def _first_s(self) -> float:
        if self.mtbf is None:
            return self.shortest_s
        return max(self.shortest_s, min(self.mtbf * _FIRST_BY_MTBF, _LONGEST_FIRST_S))
