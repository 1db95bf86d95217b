"""What the kernel says about processes, this one included."""

from __future__ import annotations

import os

__all__ = ["available_cpus", "parent_of", "process_status"]


def available_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def process_status(pid: int) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since boot) of a process, proc(5); None where unknown."""
    try:
        fields = _stat(pid)
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where unknown."""
    try:
        return int(_stat(pid)[1])
    except (OSError, ValueError, IndexError):
        return None


def _stat(pid: int) -> list[bytes]:
    """What ``/proc/PID/stat`` says from the state letter on."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The field before it is the command in parentheses and may itself hold spaces and parentheses.
        return file.read().rpartition(b")")[2].split()
