"""Asks the ``when=`` policy, and remembers from where it counts."""

from __future__ import annotations

import time

from asyncckpt.policies.when import When

__all__ = ["SaveDecider"]


class SaveDecider:
    """Whether a save is due; used by the thread that trains.

    Args:
        when: the policy; None is never due.
    """

    def __init__(self, when: When | None) -> None:
        self._when = when
        self._last_step: int | None = None
        self._last_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after *step*; counting then starts anew."""
        if self._when is None or not self._when.due(step, time.monotonic(), self._last_step, self._last_s):
            return False
        self.count_from(step)
        return True

    def count_from(self, step: int) -> None:
        """*step* was just saved or restored."""
        self._last_step, self._last_s = step, time.monotonic()

    def __repr__(self) -> str:
        return f"<SaveDecider {self._when!r} since step {self._last_step}>"
