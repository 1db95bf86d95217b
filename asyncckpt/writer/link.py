"""Starts a writer, as a process or as a thread, and holds the trainer's end of its socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Protocol

import anyio

from asyncckpt.logs import get_logger
from asyncckpt.memory import is_memfd_available
from asyncckpt.processes import process_status
from asyncckpt.writer.framing import BlockingChannel

__all__ = ["Link", "ProcessLink", "ThreadLink", "can_start_process"]

_logger = get_logger("asyncckpt.writer")
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)


class Link(Protocol):
    """A started writer.

    ``local_arenas`` tells whether arenas are found in this process instead of being passed by
    descriptor. `wait` returns whether the writer ended within the timeout. ``can_kill``: a thread
    cannot be killed, and must then be waited for however long it takes, because it reads the arenas.
    """

    channel: BlockingChannel
    local_arenas: bool
    can_kill: bool

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None) -> bool: ...

    def kill(self) -> None: ...

    def is_stopped(self) -> bool: ...

    def describe_end(self) -> str: ...


def can_start_process() -> bool:
    """Whether this platform can run the writer as a process: descriptor passing and an interpreter."""
    return bool(sys.executable) and is_memfd_available()


class ProcessLink:
    """A writer process in a session of its own, so that no signal to our group reaches it.

    Args:
        nice: its niceness.
        inherit: further descriptors it keeps open (the run lock).
    """

    local_arenas = False
    can_kill = True

    def __init__(self, nice: int, inherit: tuple[int, ...]) -> None:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as on_error, theirs:
            on_error.callback(ours.close)
            self._process = subprocess.Popen(
                # -P: a file of the user's named like a module of ours must not be imported instead.
                [sys.executable, "-P", "-m", "asyncckpt.writer", str(theirs.fileno()), str(nice)],
                env=_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                # A pipeline such as `train.py | tee` ends with the trainer, not with the writer.
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *inherit),
                start_new_session=True,
            )
            on_error.pop_all()
        self.channel = BlockingChannel(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout: float | None) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill it and end the conversation, which a process stuck in the kernel would keep open."""
        self._process.kill()
        self.channel.shutdown()
        # One that is stuck in the kernel dies when the storage lets go of it, perhaps much later. RuntimeError:
        # the interpreter is ending, and with it whoever would have to reap.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._process.wait, name="asyncckpt-reaper", daemon=True).start()

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it; a debugger that traces it has not."""
        status = process_status(self._process.pid)
        return status is not None and status[0] == "T"

    def describe_end(self) -> str:
        code = self._process.poll()
        if code is None:
            return "closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


class ThreadLink:
    """The same service on a daemon thread of this process."""

    local_arenas = True
    can_kill = False

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self.channel = BlockingChannel(ours)
        self._thread = threading.Thread(target=self._run, name="asyncckpt-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Here, because a trainer with a writer process needs none of it, and it takes a third of all imports.
        from asyncckpt.writer.service import serve

        with self._theirs:
            try:
                anyio.run(serve, self._theirs)
            except Exception:
                _logger.exception("the writer thread failed")

    @property
    def pid(self) -> int:
        return os.getpid()

    def wait(self, timeout: float | None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def kill(self) -> None:
        """A thread cannot be killed."""

    def is_stopped(self) -> bool:
        return False

    def describe_end(self) -> str:
        return "thread ended"


def _environment() -> dict[str, str]:
    path = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        # numpy's BLAS would reserve a stack and a buffer per core for nothing.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
