"""Which checkpoints to keep: frozen values; `repository.retention` turns them into a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import KINDS, CheckpointInfo, Kind
from asyncckpt.policies.checks import require_count, require_duration

__all__ = ["Best", "Keep", "is_among_best", "rank_best"]


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the checkpoints with the best value of one metric.

    Attributes:
        metric: name in the ``metrics`` given to ``save()`` or ``step()``.
        mode: ``"min"``: smaller is better; ``"max"``: larger is.
        n: how many to keep.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    n: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise InvalidOptionError(f"Best.metric must name a metric, not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise InvalidOptionError(f"Best.mode must be 'min' or 'max', not {self.mode!r}")
        require_count("Best.n", self.n, 1)


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep a checkpoint if any rule says so; the newest and tagged ones are always kept.

    Attributes:
        last: the newest so many, at least 1; ``None`` keeps all. Also as many that were saved last: others
            only while a run that restored an older step has not passed the newer ones again.
        every_steps: the first checkpoint of every so many steps, for good (the one at the multiple itself
            when there is one).
        every_seconds: the first checkpoint of every so many seconds, for good.
        best: the best by a metric.
        tags: which tags protect a checkpoint; ``None``: any does.
        kinds: which kinds are kept for good. Those somebody asked for by name, by default: ``"manual"``, and
            ``"final"``, the result of a run, which going on with it must not remove. All others are equal: an
            emergency or validation checkpoint counts among the last ones as a regular one does.
    """

    last: int | None = 3
    every_steps: int | None = None
    every_seconds: float | None = None
    best: Best | None = None
    tags: tuple[str, ...] | None = None
    kinds: tuple[Kind, ...] = ("manual", "final")

    def __post_init__(self) -> None:
        if self.last is not None:
            require_count("Keep.last", self.last, 1)
        if self.every_steps is not None:
            require_count("Keep.every_steps", self.every_steps, 1)
        if self.every_seconds is not None:
            require_duration("Keep.every_seconds", self.every_seconds)
        if self.best is not None and not isinstance(self.best, Best):
            raise InvalidOptionError(f"Keep.best must be a Best, not {self.best!r}")
        if isinstance(self.tags, str):
            raise InvalidOptionError("Keep.tags must be a tuple of tags, not a string")
        if isinstance(self.kinds, str) or any(kind not in KINDS for kind in self.kinds):
            raise InvalidOptionError(f"Keep.kinds must be a tuple of {', '.join(map(repr, KINDS))}, not {self.kinds!r}")


def rank_best(committed: Iterable[CheckpointInfo], best: Best) -> list[CheckpointInfo]:
    """The checkpoints that have the metric, best first.

    A missing value or NaN never wins, nor does a checkpoint that is known to hold NaN or infinity. Of equal values
    the earliest step wins: later ones usually just repeat it because nothing was evaluated in between.
    """
    ranked = [
        (score, info)
        for info in committed
        if info.finite is not False and (score := _score(info.metrics, best)) is not None
    ]
    ranked.sort(key=lambda pair: (pair[0], pair[1].step))
    return [info for _, info in ranked]


def is_among_best(metrics: Mapping[str, float], others: Iterable[Mapping[str, float]], best: Best) -> bool:
    """Whether *metrics* rank among the best ``best.n`` of *others* and themselves; an equal value came first."""
    score = _score(metrics, best)
    if score is None:
        return False
    scores = (_score(other, best) for other in others)
    return sum(other is not None and other <= score for other in scores) < best.n


def _score(metrics: Mapping[str, float], best: Best) -> float | None:
    """The value of the metric, signed so that less is better; None when it is missing or NaN."""
    # Metrics come from a header, which another program may have written: any value, of any size.
    value = metrics.get(best.metric)
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    if math.isnan(number):
        return None
    return number if best.mode == "min" else -number
