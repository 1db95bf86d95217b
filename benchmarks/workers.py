"""Runs a measurement in a process of its own, so that no saver sees what another one left behind."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from memory import MemoryWatch

__all__ = ["Tell", "run_in_process", "run_watched"]

Tell = Callable[[str], None]
"""How a worker tells its parent that it got somewhere."""

# What workers need (optimizers bring torch._dynamo) and none measures: imported once, in a server that forks them.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "numpy", "torch._dynamo", "torch.distributed.checkpoint"])


def run_in_process(
    work: Callable[..., Any], *arguments: Any, log: Path, on_tell: Callable[[str, int], object] | None = None
) -> Any:
    """Call ``work(tell, *arguments)`` in a fresh process and return what it returns.

    Args:
        work: a function of a module; what it and its children print goes to *log*.
        on_tell: called with each text that the worker tells, and the worker's process id.

    Raises:
        RuntimeError: it raised or died.
    """
    receiving, sending = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(sending, log, work, arguments))
    process.start()
    sending.close()
    try:
        while True:
            kind, value = receiving.recv()
            if kind == "result":
                process.join(60)
                return value
            if kind == "error":
                raise RuntimeError(f"{work.__module__} failed:\n{value}{log.read_text()[-4000:]}")
            if on_tell is not None:
                assert process.pid is not None
                on_tell(value, process.pid)
    except EOFError:
        raise RuntimeError(f"{work.__module__} died:\n{log.read_text()[-4000:]}") from None
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiving.close()


def run_watched(work: Callable[..., Any], *arguments: Any, log: Path) -> dict[str, Any]:
    """`run_in_process`, and what memory its process and their children take, looked at from outside.

    Args:
        work: tells ``ready`` when memory is to be looked at once, ``watch`` and ``unwatch`` around what takes most.
        log: where it prints.

    Returns:
        What *work* returned, with ``idle_bytes`` and ``peak_bytes``.
    """
    watches: list[MemoryWatch] = []
    with ExitStack() as watching:

        def follow(told: str, pid: int) -> None:
            watching.close()
            if told != "unwatch":
                watches.append(watching.enter_context(MemoryWatch(pid)))
            if told == "ready":
                watching.close()  # one sample

        result = run_in_process(work, *arguments, log=log, on_tell=follow)
    idle, saving = watches
    return {**result, "idle_bytes": idle.peak_bytes, "peak_bytes": saving.peak_bytes}


def _run(sending: Connection, log: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        result = work(lambda text: sending.send(("told", text)), *arguments)
    except BaseException:
        sending.send(("error", traceback.format_exc()))
        raise
    sending.send(("result", result))
    sending.close()
