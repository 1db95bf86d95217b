"""Entry point of the writer process: ``python -m asyncckpt.writer FD NICE``.

*FD* is an inherited stream socket to the trainer. The process has a session of its own (the trainer
starts it so), ignores the signals a launcher or a terminal sends to the whole group, and ends by
itself once the trainer is gone and everything staged is committed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading

import anyio

from asyncckpt.writer.service import serve

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 256 * 2**20
_PR_SET_NAME = 15
_ALLOCATIONS_PER_COLLECTION = 50_000


def _keep_freed_memory() -> None:
    # Each encoded chunk is a fresh few-megabyte object. By default glibc maps and unmaps each one, and
    # zeroing its pages costs more than lz4 does.
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def _collect_rarely() -> None:
    # The records of a large save are many objects and no garbage, which the collector would go through again and
    # again: a tenth of the time of a save of 10,000 tensors.
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS_PER_COLLECTION, 10, 10)


def _name_process() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"asyncckpt-write", 0, 0, 0)


def _leave_threads_behind() -> None:
    # One may be in the kernel, with a mirror whose disk hangs, and keep the process from ending. The run's lock,
    # whose descriptor was inherited, must not stay with it.
    if threading.active_count() > 1:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os._exit(0)


def main() -> None:
    """Serve the trainer on the inherited descriptor until it is gone."""
    descriptor, nice = int(sys.argv[1]), int(sys.argv[2])
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(nice)
    _keep_freed_memory()
    _collect_rarely()
    _name_process()
    with socket.socket(fileno=descriptor) as sock:
        sock.setblocking(False)
        anyio.run(serve, sock)
    _leave_threads_behind()


if __name__ == "__main__":
    main()
