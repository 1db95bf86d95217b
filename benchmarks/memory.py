"""Memory of a process and its descendants."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["MemoryWatch", "resident_bytes", "return_freed_memory", "tree_bytes"]


class MemoryWatch:
    """Samples the proportional set size (Pss) of a process tree until it is left.

    Pss counts a page that n processes map as 1/n for each, so memory shared between a trainer and
    its writer counts once; pages of the page cache that nobody maps do not count. Reading it walks
    the page tables of the process, which disturbs it: watch a save of its own, not a timed one.

    Attributes:
        peak_bytes: the largest sum seen.
    """

    def __init__(self, pid: int, interval_s: float = 0.05) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))
            if self._stop.wait(self._interval_s):
                return


def tree_bytes(pid: int) -> int:
    """Proportional set size of *pid* and its descendants."""
    return sum(_pss_bytes(member) for member in _process_tree(pid))


def resident_bytes(pid: int) -> int:
    """Resident bytes of *pid*, without those of memory files such as arenas."""
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # the first line of a mapping: addresses, permissions, ..., path
            counts = "/memfd:" not in rest
        elif name == "Rss:" and counts:
            total += int(rest.split()[0]) * 1024
    return total


def return_freed_memory() -> None:
    """Give what building the state has freed back to the system, so that it does not count as the saver's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _process_tree(pid: int) -> Iterator[int]:
    """*pid* and all its descendants that are still its descendants."""
    yield pid
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread ended
            for child in listing.read_text().split():
                yield from _process_tree(int(child))


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it ended, or is a zombie
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)
