"""What the kernel says about processes, this one included."""

from __future__ import annotations

import os

__all__ = ["available_cpus", "process_status"]


def available_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def process_status(pid: int) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since boot) of a process, proc(5); None where unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in parentheses and may itself hold spaces and parentheses.
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
