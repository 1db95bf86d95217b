"""Tells from outside whether a writer still works. Pure: it counts checks and reads no clock.

Counting instead of timing: after the whole job was suspended (``scontrol suspend``, a laptop's lid)
the trainer may be the first to go on, and must not take the time it slept itself for the writer's.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["CHECK_INTERVAL_S", "Symptom", "WriterWatch"]

CHECK_INTERVAL_S = 0.5
"""How long the trainer listens before it looks at a writer that says nothing."""

_STOPPED_CHECKS = 3  # 1.5 s, so that a stopped writer is replaced within 2 s
_SILENT_CHECKS = 60  # 30 s without the sign of life it gives every 5 s: starved machines are slow, not dead

Symptom = Literal["stopped", "silent", "stalled"]
"""``stopped``: by a signal. ``silent``: its event loop does not run. ``stalled``: the storage takes nothing."""


class WriterWatch:
    """One per writer; used by the thread that listens to it.

    Args:
        stall_timeout_s: how long a save may make no progress; None is for ever.
    """

    def __init__(self, stall_timeout_s: float | None) -> None:
        self._stall_checks = None if stall_timeout_s is None else max(1, round(stall_timeout_s / CHECK_INTERVAL_S))
        self._num_stopped = 0
        self._num_silent = 0
        self._num_stalled = 0

    def heard(self, *, is_progress: bool) -> None:
        """The writer said something; *is_progress* tells whether a save got further by it."""
        self._num_stopped = self._num_silent = 0
        if is_progress:
            self._num_stalled = 0

    def check(self, *, is_stopped: bool, is_busy: bool) -> Symptom | None:
        """Another `CHECK_INTERVAL_S` went by without a word.

        Args:
            is_stopped: the kernel says that the process is stopped.
            is_busy: it has a save to write.
        """
        self._num_stopped = self._num_stopped + 1 if is_stopped else 0
        self._num_silent = self._num_silent + 1 if is_busy else 0
        self._num_stalled = self._num_stalled + 1 if is_busy else 0
        if self._num_stopped >= _STOPPED_CHECKS:
            return "stopped"
        if self._num_silent >= _SILENT_CHECKS:
            return "silent"
        if self._stall_checks is not None and self._num_stalled >= self._stall_checks:
            return "stalled"
        return None

    def __repr__(self) -> str:
        return f"<WriterWatch stopped={self._num_stopped} silent={self._num_silent} stalled={self._num_stalled}>"
