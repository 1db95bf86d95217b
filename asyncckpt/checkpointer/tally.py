"""Keeps the `Statistics` of one checkpointer."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from asyncckpt.model import CheckpointInfo, Outcome, SaveStats, Statistics

__all__ = ["Tally"]


class Tally:
    """Counts. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statistics = Statistics()

    @property
    def statistics(self) -> Statistics:
        """Totals so far."""
        return self._statistics

    def note_save(self, stats: SaveStats) -> None:
        """A call of ``save()`` returned."""
        with self._lock:
            blocked = self._statistics.blocked.including(stats.blocked_s)
            self._change(num_saves=1, blocked=blocked)

    def note_end(self, step: int, outcome: Outcome, stats: SaveStats) -> None:
        """The save of *step* ended."""
        with self._lock:
            self._change(**{f"num_{outcome}": 1})
            if outcome == "durable":
                self._change(
                    raw_bytes=stats.raw_bytes,
                    stored_bytes=stats.stored_bytes,
                    linked_bytes=stats.linked_bytes,
                    stage=self._statistics.stage.including(stats.stage_s),
                    durable=self._statistics.durable.including(stats.durable_s),
                )
                self._statistics = replace(self._statistics, last=stats, last_step=step)

    def note_pruned(self, count: int) -> None:
        """Retention removed *count* checkpoints."""
        with self._lock:
            self._change(num_pruned=count)

    def note_restore(self, found: CheckpointInfo, restore_s: float) -> None:
        """A checkpoint was restored."""
        with self._lock:
            restore = self._statistics.restore.including(restore_s)
            self._change(num_restores=1, num_fallbacks=len(found.fell_back_from), restore=restore)

    def note_writer_restart(self) -> None:
        """The writer was replaced."""
        with self._lock:
            self._change(num_writer_restarts=1)

    def _change(self, **changes: Any) -> None:
        """Add numbers, replace everything else."""
        before = self._statistics
        added = {
            name: getattr(before, name) + value if isinstance(value, int) else value for name, value in changes.items()
        }
        self._statistics = replace(before, **added)

    def __repr__(self) -> str:
        return f"<Tally {self._statistics!r}>"
