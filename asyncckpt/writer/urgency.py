"""What a `Hurry` changes for the threads that encode, and how the system is asked for more."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading

__all__ = ["PutBackError", "Urgency", "raise_priority"]

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_BEST_EFFORT = 2 << 13  # highest of the class that needs no privilege


class PutBackError(Exception):
    """The save that is being written has to wait for another one. Nobody outside of the writer sees it."""


class Urgency:
    """Looked at before each chunk, so that a save of gigabytes reacts within one.

    Threads: the event loop sets, encode threads look. ``done_bytes`` has a lock, since they all add to it.

    Attributes:
        compress: whether chunks are compressed; without, they are stored frames of the same codec.
        done_bytes: raw bytes of the current attempt that threads have taken up.
    """

    def __init__(self) -> None:
        self.compress = True
        self.done_bytes = 0
        self._is_put_back = False
        self._lock = threading.Lock()

    def begin_save(self) -> None:
        """The turn of a save has come, for the first time or again."""
        self._is_put_back = False

    def begin(self) -> None:
        """Another attempt at a save begins."""
        self.done_bytes = 0

    def put_back(self) -> None:
        """End the turn of this save at its next chunk, also in a further attempt; a commit goes on."""
        self._is_put_back = True

    def before_chunk(self, num_bytes: int) -> bool:
        """Whether to compress the chunk of *num_bytes* raw bytes that comes now.

        Raises:
            PutBackError: see `put_back`.
        """
        if self._is_put_back:
            raise PutBackError
        with self._lock:
            self.done_bytes += num_bytes
        return self.compress

    def __repr__(self) -> str:
        state = "putting back" if self._is_put_back else "compressing" if self.compress else "plain"
        return f"<Urgency {state} done={self.done_bytes}>"


def raise_priority() -> None:
    """Let this process compete as a normal one for CPU and disk, as far as that is permitted.

    Lowering the niceness needs ``CAP_SYS_NICE`` or ``RLIMIT_NICE``; the I/O priority needs nothing.
    """
    if sys.platform != "linux":
        return
    for thread in map(int, os.listdir("/proc/self/task")):  # both belong to threads on Linux
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, 0)
        _raise_io_priority(thread)


def _raise_io_priority(thread: int) -> None:
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:  # the C library has no function for it
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, thread, _IOPRIO_BEST_EFFORT)
