"""Runs a program under strace and reads what it did: every modelled call, its bytes and its order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Call", "Descriptor", "TracingRefusedError", "read_trace", "record"]

_HERE = Path(__file__).parent
_CALLS = (
    "openat,mkdir,mkdirat,write,pwrite64,ftruncate,fsync,fdatasync,syncfs,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir"
)
# Bytes of one write that strace prints; all strings come as \x.., so that no quote ever occurs inside one.
_LONGEST = 3 * 2**20
_LINE = re.compile(r"(\d+) +(?:(\w+)\(|<\.\.\. (\w+) resumed>)(.*)$", re.DOTALL)
_RESULT = re.compile(r"\)\s+= (-?\d+)(?:<[^>]*>)?(?: .*)?$")
_TOKEN = re.compile(r'"([^"]*)"(\.\.\.)?|(AT_FDCWD|\d+)<([^>]*)>|([^\s,"]+)')
_UNFINISHED = " <unfinished ...>"


class TracingRefusedError(Exception):
    """strace is not installed, or may not trace here."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A file descriptor and the path it led to at that moment; ``-1`` is the working directory."""

    number: int
    path: str


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that succeeded.

    Attributes:
        arguments: strings as bytes, descriptors as `Descriptor`, the rest as text.
        start: when it was issued; only the order of these numbers means anything.
        end: when it returned; the same as *start* unless another thread's call came between.
    """

    name: str
    arguments: tuple[bytes | Descriptor | str, ...]
    result: int
    start: int
    end: int


def record(scenario: str, flush: str, workspace: Path, package: Path) -> Path:
    """Run one scenario of `program` with the asyncckpt in *package* and trace it.

    Args:
        workspace: a new directory; what is modelled is its ``top`` and all below.

    Returns:
        The trace, for `read_trace`.

    Raises:
        TracingRefusedError: there is no strace, or it may not trace.
        RuntimeError: the program failed.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise TracingRefusedError("strace is not installed")
    (workspace / "top").mkdir(parents=True)
    trace = workspace / "trace"
    options = ["-f", "-y", "-xx", "-qq", "-s", str(_LONGEST), "-e", f"trace={_CALLS}", "-e", "signal=none"]
    program = [str(_HERE / "program.py"), scenario, flush, str(workspace / "top/new/deeper/root")]
    result = subprocess.run(
        [strace, *options, "--seccomp-bpf", "-o", str(trace), sys.executable, *program, str(workspace / "marks")],
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in result.stderr.lower() or not trace.exists() or not trace.stat().st_size:
        raise TracingRefusedError(f"strace cannot trace here: {result.stderr.strip()[-300:]}")
    if result.returncode != 0:
        raise RuntimeError(f"the traced program failed: {result.stderr[-2000:]}")
    return trace


def read_trace(trace: Path) -> list[Call]:
    """The calls in *trace* that succeeded, in the order in which they were issued."""
    return sorted(_calls(trace), key=lambda call: call.start)


def _calls(trace: Path) -> Iterator[Call]:
    open_calls: dict[str, tuple[int, str, str]] = {}
    with trace.open(encoding="ascii") as lines:
        for number, line in enumerate(lines):
            match = _LINE.match(line.rstrip("\n"))
            if match is None:
                continue
            thread, name, resumed, rest = match.groups()
            start = number
            if resumed:
                start, name, before = open_calls.pop(thread)
                rest = before + rest
            if rest.endswith(_UNFINISHED):
                open_calls[thread] = (start, name, rest.removesuffix(_UNFINISHED))
                continue
            result = _RESULT.search(rest)
            if result is not None and int(result[1]) >= 0:
                yield Call(name, tuple(_arguments(rest[: result.start()])), int(result[1]), start, number)


def _arguments(text: str) -> Iterator[bytes | Descriptor | str]:
    for string, cut, number, path, word in _TOKEN.findall(text):
        if word:
            yield word
        elif number:
            yield Descriptor(-1 if number == "AT_FDCWD" else int(number), os.fsdecode(_unescape(path)))
        elif cut:
            raise ValueError(f"strace cut a string of more than {_LONGEST} bytes short")
        else:
            yield _unescape(string)


def _unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
