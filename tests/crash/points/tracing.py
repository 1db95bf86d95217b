"""Attaches strace to a running writer: to record its system calls, or to make one of them fail."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DURABLE_CALLS", "Call", "Tracer", "TracingRefusedError", "read_calls"]

DURABLE_CALLS = (
    "openat",
    "mkdir",
    "mkdirat",
    "write",
    "pwrite64",
    "ftruncate",
    "fsync",
    "fdatasync",
    "syncfs",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "rmdir",
)
_LINE = re.compile(r"(\d+) +(\w+)\((.*)$")
_STEP = re.compile(r"step-(\d{8,})(-\w+(?:\.\d+)?)?")
_TIMEOUT_S = 60


class TracingRefusedError(Exception):
    """strace is missing or may not attach here."""


class Tracer:
    """strace attached to all threads of *pid*; its counters start now.

    Args:
        pid: the process, idle.
        log: where strace writes what it sees.
        inject: an ``inject=`` expression without that word; None only records.

    Raises:
        TracingRefusedError: strace cannot do that here.
    """

    def __init__(self, pid: int, log: Path, inject: str | None = None) -> None:
        strace = shutil.which("strace")
        if strace is None:
            raise TracingRefusedError("strace is not installed")
        # A name with a question mark may be unknown to the architecture.
        calls = ",".join(f"?{name}" for name in DURABLE_CALLS)
        command = [strace, "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-e", "signal=none", "-o", str(log)]
        if inject is not None:
            command += ["-e", f"inject={inject}"]
        self._process = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        said = ""
        while "attached" not in said:
            line = self._process.stderr.readline()
            if not line:
                self._process.wait(_TIMEOUT_S)
                self._process.stderr.close()
                raise TracingRefusedError(said.strip() or "strace ended at once")
            said += line

    def detach(self) -> None:
        """Let the process go on untraced."""
        self._process.terminate()
        self.wait_gone()

    def wait_gone(self) -> None:
        """Wait until strace has ended, as it does when the traced process does."""
        self._process.communicate(timeout=_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Call:
    """One system call on a file below the root.

    Attributes:
        name: as strace calls it.
        number: how many calls of that name its thread had made, this one included; what strace counts
            in ``when=``.
        path: relative to the root, steps renamed to what they are: ``PARTIAL``, ``NEW`` or ``OLD``.
        creates: it was asked to create a file.
        is_struck: strace failed it.
        is_unanswered: the process ended before it returned.
    """

    name: str
    number: int
    path: str
    creates: bool
    is_struck: bool
    is_unanswered: bool


def read_calls(log: Path, root: Path, step: int) -> list[Call]:
    """The calls in *log* of the one thread that touches files below *root* while *step* is saved.

    Raises:
        AssertionError: several threads do, so that no count says which call is meant.
    """
    counts: Counter[tuple[str, str]] = Counter()
    calls: list[tuple[str, Call]] = []
    lines = log.read_text().splitlines()
    resumed = _resumed(lines)
    for index, line in enumerate(lines):
        found = _LINE.match(line)
        if found is None:
            continue
        thread, name, rest = found.groups()
        counts[thread, name] += 1
        if "<unfinished ...>" in rest:
            rest += resumed.get(index, "")
        paths = re.findall(re.escape(str(root)) + r'([^">]*)[">]', rest)
        if paths:
            calls.append(
                (
                    thread,
                    Call(
                        name,
                        counts[thread, name],
                        " ".join(_generic(path, step) for path in paths[: 2 if name.startswith("rename") else 1]),
                        "O_CREAT" in rest,
                        "(INJECTED)" in rest,
                        not re.search(r"\) += +-?\d", rest),
                    ),
                )
            )
    assert len({thread for thread, _ in calls}) == 1, "the writer writes with several threads"
    return [call for _, call in calls]


def _resumed(lines: list[str]) -> dict[int, str]:
    """For each line that another thread's line interrupted: how it went on."""
    waiting: dict[str, int] = {}
    endings: dict[int, str] = {}
    for index, line in enumerate(lines):
        thread, _, rest = line.partition(" ")
        if "<unfinished ...>" in line:
            waiting[thread] = index
        elif " resumed>" in rest and thread in waiting:
            endings[waiting.pop(thread)] = rest
    return endings


def _generic(path: str, step: int) -> str:
    def name(found: re.Match[str]) -> str:
        return "PARTIAL" if found[2] else "NEW" if int(found[1]) == step else "OLD"

    return _STEP.sub(name, path) or "/"
