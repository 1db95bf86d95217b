"""What Python itself costs: its lock, where threads take it in turn, and its garbage collector."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Lane", "collector_paused"]

_QUICK_S = 0.5e-3


class Lane:
    """One thread at a time while the storage is quick, any number when it is slow.

    A small file is a dozen calls that each let go of the interpreter's lock and want it back. Where the kernel answers
    from memory, threads then mostly pass the lock around: four take twice as long as one. Where each call waits
    for a server or a disk, four are four times as fast. Which it is, is measured.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._is_quick = True

    @contextlib.contextmanager
    def batch(self, num_files: int) -> Iterator[None]:
        """In the block the caller handles so many files."""
        with self._lock if self._is_quick else contextlib.nullcontext():
            started = self._clock()
            yield
            self._is_quick = self._clock() - started <= num_files * _QUICK_S


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection in the block, for work that makes many objects and no garbage.

    They would set off several full collections, each of which visits the whole heap of the trainer.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
