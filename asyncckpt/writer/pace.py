"""Lets a copy in the background give way to the saves, and end early."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["CopyStoppedError", "Pace"]

_PAUSE_S = 1.0
"""How long a copy pauses between two blocks while a save is written. Not for ever: training that always saves
would never be mirrored. A block of 4 MiB each second costs a save nothing that can be measured."""


class CopyStoppedError(Exception):
    """The copy was told to end. Not an error of the package: nobody outside of the writer sees it."""


class Pace:
    """Called by the thread that copies, between blocks; the other methods by anybody.

    State: ``_may_go`` is clear while a save is written; both are set for good by `stop`.
    """

    def __init__(self) -> None:
        self._may_go = threading.Event()
        self._may_go.set()
        self._is_stopped = threading.Event()

    def __call__(self) -> None:
        """Wait while a save is written, but not for long.

        Raises:
            CopyStoppedError: `stop` was called.
        """
        self._may_go.wait(_PAUSE_S)
        if self._is_stopped.is_set():
            raise CopyStoppedError

    @property
    def is_stopped(self) -> bool:
        """Whether nothing is to be copied any more."""
        return self._is_stopped.is_set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A save is being written."""
        self._may_go.clear()
        try:
            yield
        finally:
            self._may_go.set()

    def stop(self) -> None:
        """End the copy at its next block; it cannot be undone."""
        self._is_stopped.set()
        self._may_go.set()

    def __repr__(self) -> str:
        state = "stopped" if self.is_stopped else "going" if self._may_go.is_set() else "held"
        return f"<Pace {state}>"
