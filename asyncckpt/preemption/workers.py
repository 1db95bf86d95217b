"""DataLoader workers and signals that are sent to the whole process group.

Launchers, schedulers and terminals signal every process of a job. A worker that dies of it takes the training down
with it, before the step that the grace period is for. So workers ignore such signals.

But SIGTERM is also how `multiprocessing` ends the workers that are left when the trainer exits, and then it waits for
them, for ever if they ignore it. So the trainer kills those just before. Rejected: telling the trainer's SIGTERM by its
sender with ``sigwaitinfo`` in a thread of the worker, for which every thread must block the signal; those of torch and
numpy are there before the worker is initialised, and do not.

This module imports nothing heavy: workers that are spawned import it.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.util  # registers its exit function now, so that ours runs before it
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from asyncckpt.errors import InvalidOptionError

__all__ = ["is_worker_death", "shield_worker", "shield_workers"]

_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
_DEATH = re.compile(r"DataLoader worker \(pid.*(is killed by signal|exited unexpectedly)", re.DOTALL)

_Loader = TypeVar("_Loader", bound=Any)


def shield_worker(worker_id: int) -> None:
    """Keep this DataLoader worker alive when its process group is signalled: ``worker_init_fn=ac.shield_worker``.

    It then ignores SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2, except those for which Python code has installed a
    handler. It still ends with its trainer, as torch's workers do: when it is told to, or when the trainer is gone.

    A worker is safe from here on. `shield_workers` also covers the moment between its start and this call.

    Args:
        worker_id: given by the DataLoader.
    """
    for number in _ignored():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ignored())  # `_start_shielded` blocked them
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), name="asyncckpt-trainer-watch", daemon=True).start()


def _ignored() -> set[int]:
    return {getattr(signal, name) for name in _IGNORED if hasattr(signal, name)}


def _end_with(parent: Any) -> None:
    # Torch watches for another parent than the one there was when it began to watch. A worker orphaned before that
    # would take whoever adopted it for the trainer, and ignoring SIGTERM it would never end.
    parent.join()
    os._exit(1)


def _ignores_sigterm(pid: int) -> bool:
    with contextlib.suppress(OSError, StopIteration), open(f"/proc/{pid}/status") as file:
        ignored = next(line for line in file if line.startswith("SigIgn:"))
        return bool(int(ignored.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _end_shielded_workers() -> None:
    """Kill the daemonic children that would keep this process from ending."""
    stubborn = [
        child
        for child in multiprocessing.active_children()
        if child.daemon and child.pid is not None and _ignores_sigterm(child.pid)
    ]
    if stubborn and threading.current_thread() is threading.main_thread():
        # torch's handler would call that an error of the training.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in stubborn:
        child.kill()


atexit.register(_end_shielded_workers)


@dataclass(frozen=True, slots=True)
class _Shielded:
    """A ``worker_init_fn`` that shields the worker and then does what *then* does. A value, so it can be sent to it."""

    then: Callable[[int], object]

    def __call__(self, worker_id: int) -> None:
        shield_worker(worker_id)
        self.then(worker_id)


def shield_workers(loader: _Loader) -> _Loader:
    """Shield the workers of a DataLoader that exists already; see `shield_worker`.

    Args:
        loader: its own ``worker_init_fn`` is called as well.

    Returns:
        The same loader.

    Raises:
        InvalidOptionError: its persistent workers have been started already.
    """
    if getattr(loader, "_iterator", None) is not None:
        raise InvalidOptionError("the workers of this loader are running; call shield_workers before iterating over it")
    init = loader.worker_init_fn
    if init is not shield_worker and not isinstance(init, _Shielded):
        loader.worker_init_fn = shield_worker if init is None else _Shielded(init)
        _start_shielded(loader)
    return loader


def _start_shielded(loader: Any) -> None:
    """Start the workers with the signals blocked, so that one that comes before `shield_worker` waits for it.

    Blocked in this thread only, from which they inherit it: the process still hears the signals.
    """
    start = getattr(loader, "_get_iterator", None)  # what DataLoader.__iter__ calls to start them
    if start is None or not hasattr(signal, "pthread_sigmask"):
        return

    def start_blocked() -> Any:
        context = loader.multiprocessing_context or multiprocessing.get_context()
        if context.get_start_method() != "fork":
            # Starting that process unblocks SIGTERM and SIGINT in this thread (Python 3.11), so it must be there first.
            resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ignored())
        try:
            return start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    loader._get_iterator = start_blocked


def is_worker_death(error: BaseException | None) -> bool:
    """Whether *error*, or one that it came from, is torch telling that a DataLoader worker has died."""
    return any(isinstance(one, RuntimeError) and _DEATH.match(str(one)) is not None for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
