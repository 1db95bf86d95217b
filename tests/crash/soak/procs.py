"""Processes as the driver sees them: children, orphans, what they hold."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from asyncckpt.processes import process_status

__all__ = ["adopt_orphans", "children", "fork", "kill", "num_threads", "open_arenas", "open_children", "reap_all"]

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on what our children leave behind becomes our child, so that none can hide."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def num_threads() -> int:
    """Threads of this process, also those that Python knows nothing of."""
    return len(os.listdir("/proc/self/task"))


def fork(run: Callable[[], NoReturn]) -> int:
    """Run *run* in a child; its pid.

    Raises:
        RuntimeError: this process has other threads, whose locks a child would inherit as they are.
    """
    if num_threads() != 1:
        raise RuntimeError(f"{num_threads()} threads: a fork would not be safe")
    pid = os.fork()
    if pid == 0:
        run()
    return pid


def children(pid: int) -> list[int]:
    """Processes that *pid* has started and not waited for, zombies included."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it is gone
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def open_children(parent: int) -> list[int]:
    """A pidfd of every child of *parent* that runs. The caller closes them."""
    descriptors: list[int] = []
    for pid in children(parent):
        status = process_status(pid)
        if status is not None and status[0] not in "ZX":
            with contextlib.suppress(ProcessLookupError):
                descriptors.append(os.pidfd_open(pid))
    return descriptors


def kill(descriptors: list[int]) -> int:
    """SIGKILL what the pidfds stand for and close them; how many of them were still there."""
    count = 0
    for descriptor in descriptors:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            count += 1
        os.close(descriptor)
    return count


def open_arenas(pid: int) -> int:
    """How many staging memory files *pid* has open."""
    inodes = set()  # Python's mmap duplicates the descriptor
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "memfd:asyncckpt-arena" in str(descriptor.readlink()):
                    inodes.add(descriptor.stat().st_ino)
    return len(inodes)


def reap_all(timeout_s: float) -> tuple[dict[int, int], list[int]]:
    """Wait for every child and orphan: exit codes (negative: signal) by pid, and those still there in the end."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        left = children(os.getpid())
        if not left or time.monotonic() >= deadline:
            return codes, left
        _wait_end(left[0], deadline - time.monotonic())


def _wait_end(pid: int, timeout_s: float) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        select.select([descriptor], [], [], max(timeout_s, 0))
    finally:
        os.close(descriptor)
