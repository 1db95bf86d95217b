"""Failed saves that nobody looked at: they must become known, but once."""

from __future__ import annotations

import warnings
from typing import Literal

from asyncckpt.future import SavePromise

__all__ = ["UnseenFailures"]


class UnseenFailures:
    """Collects failed saves and reports those whose error nobody took from the future.

    Args:
        on_error: ``"raise"`` or ``"warn"``; see `options.Writer`.
    """

    def __init__(self, on_error: Literal["raise", "warn"]) -> None:
        self._on_error = on_error
        self._failed: list[SavePromise] = []  # appended to by the thread that hears the writer

    def add(self, promise: SavePromise) -> None:
        """Note that the save of *promise* failed."""
        self._failed.append(promise)

    def report(self) -> None:
        """Raise the oldest unseen error, or warn of all of them; each is reported once.

        Raises:
            CheckpointError: a save failed, nobody looked, and ``on_error`` is ``"raise"``.
        """
        while self._failed:
            error = self._failed.pop(0).take_unseen_error()
            if error is None:
                continue
            if self._on_error == "raise":
                raise error
            warnings.warn(f"a checkpoint was lost: {error}", RuntimeWarning, stacklevel=4)

    def __repr__(self) -> str:
        return f"<UnseenFailures {len(self._failed)}>"
