"""What policies decide from: one frozen value, put together by whoever asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Costs", "Moment"]


@dataclass(frozen=True, slots=True)
class Costs:
    """What saves of this run have cost so far, smoothed; see `costs.CostMeter`. Seconds of wall time.

    Attributes:
        num_saves: how many saves were measured, at least 1.
        cost_s: training time lost per save: blocked, and in steps made slower while it was written.
        durable_s: from the begin of a save until it was durable.
        step_s: median time of a training step beside which nothing was saved; 0.0 before there was one.
    """

    num_saves: int
    cost_s: float
    durable_s: float
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Moment:
    """The moment about which a policy is asked.

    Attributes:
        step: the training step just completed.
        now_s: a monotonic clock (``time.monotonic()``), never the time of day, which jumps.
        last_step: step of the last save of any kind that this run began, or restored; ``None`` before
            there is one.
        last_s: *now_s* of that save or restore; before there is one, of the start of the run.
        in_flight: whether a save is still being written, or was until a few steps ago, so that what it
            or the next one cost could not be told.
        costs: what saves cost; ``None`` before the first one of this run is durable.
        validation: the metrics just given to ``validated()``, when that is the occasion.
        saved: with *validation*: the metrics of every other checkpoint that exists or is being written.
    """

    step: int
    now_s: float
    last_step: int | None = None
    last_s: float = 0.0
    in_flight: bool = False
    costs: Costs | None = None
    validation: Mapping[str, float] | None = None
    saved: tuple[Mapping[str, float], ...] = ()
