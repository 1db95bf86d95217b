"""What a campaign of signals has to say in the end, and of a process that should be gone."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

__all__ = ["describe_and_kill", "merge"]


def merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The summary of both campaigns: a long one can be run in pieces."""
    merged = dict(later)
    for name, value in later.items():
        before = earlier.get(name)
        if isinstance(value, dict) and before:
            merged[name] = {key: before.get(key, 0) + value.get(key, 0) for key in sorted({*before, *value})}
        elif name == "slowest_exit_s" and before:
            merged[name] = max(before, value)
        elif before is not None:
            merged[name] = before + value
    return merged


def describe_and_kill(pid: int) -> str:
    """Facts about the process *pid*, a child of ours, which is no more afterwards."""
    found = []
    with contextlib.suppress(OSError):
        for name in ("comm", "wchan", "syscall"):
            found.append(Path(f"/proc/{pid}/{name}").read_text().strip())
        found.append(f"{len(os.listdir(f'/proc/{pid}/task'))} threads")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"{pid}: {', '.join(found)}"
