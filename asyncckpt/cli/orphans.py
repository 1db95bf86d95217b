"""Finds the writers among the descendants of this process, as proc(5) tells."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from asyncckpt.processes import parent_of

__all__ = ["OrphanedWriter", "orphaned_writers"]

_MODULE = b"\0-m\0asyncckpt.writer\0"
_LOCK = "/.asyncckpt/run.lock"


@dataclass(frozen=True, slots=True)
class OrphanedWriter:
    """A writer process, and the root it holds the lock of, if that can be seen."""

    pid: int
    root: str | None

    def __str__(self) -> str:
        return f"the writer of {self.root or 'an unknown root'} (process {self.pid}{self._steps()})"

    def _steps(self) -> str:
        if self.root is None:
            return ""
        with contextlib.suppress(OSError):
            # step-00000500-<nonce>
            names = {name.rpartition("-")[0] for name in os.listdir(f"{self.root}/.asyncckpt/partial")}
            if names:
                return f", at {', '.join(sorted(names))}"
        return ""


def orphaned_writers() -> list[OrphanedWriter]:
    """The writers below this process that have not ended, by process number.

    Not those of processes that do not belong to the command: only what was started below it falls to us.
    """
    parents = _parents()
    return [
        OrphanedWriter(pid, _root(pid))
        for pid in sorted(parents)
        if _is_writer(pid) and _is_below(pid, os.getpid(), parents)
    ]


def _parents() -> dict[int, int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return {pid: parent for pid in pids if (parent := parent_of(pid)) is not None}


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def _is_writer(pid: int) -> bool:
    with contextlib.suppress(OSError):
        # Of a zombie it is empty.
        return _MODULE in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _root(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.endswith(_LOCK):
                    return target.removesuffix(_LOCK)
    return None
