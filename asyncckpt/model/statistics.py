"""Totals over the life of one checkpointer."""

from __future__ import annotations

from dataclasses import dataclass

from asyncckpt.model.saving import SaveStats

__all__ = ["Durations", "IntervalReport", "Statistics"]


@dataclass(frozen=True, slots=True)
class IntervalReport:
    """Why an adaptive policy saves as often as it does. Seconds of wall time.

    Attributes:
        interval_s: the time between the begins of two saves.
        cost_s: training time lost per save, as measured and smoothed; 0.0 before the first save.
        durable_s: from the begin of a save until it is durable, likewise.
        overhead: part of the training time that saving takes at this interval.
        reason: what the interval follows from.
    """

    interval_s: float
    cost_s: float = 0.0
    durable_s: float = 0.0
    overhead: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Durations:
    """How long something took, over all times it happened; in seconds.

    Attributes:
        count: how often it happened.
        total_s: sum.
        min_s: shortest, 0.0 when it never happened.
        max_s: longest.
        last_s: the latest.
    """

    count: int = 0
    total_s: float = 0.0
    min_s: float = 0.0
    max_s: float = 0.0
    last_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Average; 0.0 when it never happened."""
        return self.total_s / self.count if self.count else 0.0

    def including(self, seconds: float) -> Durations:
        """These and one more of *seconds*."""
        return Durations(
            count=self.count + 1,
            total_s=self.total_s + seconds,
            min_s=min(self.min_s, seconds) if self.count else seconds,
            max_s=max(self.max_s, seconds),
            last_s=seconds,
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Totals over the life of one checkpointer; see `SaveStats` for units.

    Attributes:
        num_saves: calls of ``save()`` that returned; every one ends in one of the five outcomes below.
        num_durable: saves that were committed.
        num_failed: saves that failed.
        num_skipped: saves given up because every staging slot was taken.
        num_superseded: saves whose place a newer one took.
        num_cancelled: saves that were cancelled in time.
        num_pruned: checkpoints that retention removed.
        num_restores: successful ``restore()`` calls that found a checkpoint.
        num_fallbacks: damaged checkpoints that they skipped for an older one.
        num_writer_restarts: how often a dead or hanging writer was replaced.
        raw_bytes: bytes of the tensors of all durable saves.
        stored_bytes: bytes of the files of all durable saves.
        linked_bytes: those of ``stored_bytes`` that were shared with the previous step.
        blocked: how long ``save()`` kept the caller: the time that training lost.
        stage: from ``save()`` until staged, of durable saves.
        durable: from ``save()`` until durable, of durable saves.
        restore: how long ``restore()`` took.
        last: what the last durable save cost.
        num_mirrored: checkpoints that were copied to the mirror.
        mirrored_bytes: what was written for that.
        last_step: the step it saved.
        policy: what ``when=`` decides and why, if it is adaptive.
    """

    num_saves: int = 0
    num_durable: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_superseded: int = 0
    num_cancelled: int = 0
    num_pruned: int = 0
    num_restores: int = 0
    num_fallbacks: int = 0
    num_writer_restarts: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    linked_bytes: int = 0
    blocked: Durations = Durations()
    stage: Durations = Durations()
    durable: Durations = Durations()
    restore: Durations = Durations()
    last: SaveStats | None = None
    num_mirrored: int = 0
    mirrored_bytes: int = 0
    last_step: int | None = None
    policy: IntervalReport | None = None

    @property
    def blocked_s(self) -> float:
        """How long all calls of ``save()`` together kept training waiting."""
        return self.blocked.total_s
