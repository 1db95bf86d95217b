"""The ways out: closing, leaving a block, and the end of the interpreter.

Each of them waits until everything is durable, says what it waits for, and can be left.

A Ctrl-C while it waits says so and is kept; it is raised when everything is durable. One more leaves at
once. In asyncio a cancellation of the task is taken likewise: it is how `asyncio.run` passes Ctrl-C on, and
whoever cancels a task does not thereby want its checkpoints lost.

Rejected: a SIGINT handler of our own while waiting, which would take it from notebooks, asyncio and trio;
threads that are started here when the interpreter ends, which Python 3.12 and later refuse (`close_at_exit`
waits in the thread that it is called in).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import anyio

from asyncckpt.checkpointer.backlog import Backlog, BacklogMeter
from asyncckpt.checkpointer.reporting import Reporter, open_reporter
from asyncckpt.errors import CheckpointError
from asyncckpt.future import SaveFuture, loop_bridge
from asyncckpt.logs import get_logger

__all__ = ["Closeable", "Departure", "Farewell", "close_at_exit", "countdown", "quiet_if"]

_logger = get_logger("asyncckpt")
_LOOK_S = 0.25


class Closeable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Departure:
    """How waiting ended.

    Attributes:
        is_closed: everything has ended.
        waited_s: how long it took.
        is_left: it has not ended, and the user left all the same.
        interrupt: what was raised while waiting, and is to be raised again.
    """

    is_closed: bool
    waited_s: float
    is_left: bool = False
    interrupt: BaseException | None = None

    def raise_interrupt(self) -> None:
        """Raise what was kept, if anything."""
        if self.interrupt is not None:
            raise self.interrupt


class Farewell:
    """Waits for one checkpointer to end.

    Args:
        attempt: ends it; gets seconds to try, returns whether it has ended. Repeatable, from any thread.
        futures: the saves that have not ended.
        outlives: whether the writer goes on when this process ends.
    """

    def __init__(
        self, attempt: Callable[[float], bool], futures: Callable[[], list[SaveFuture]], *, outlives: bool
    ) -> None:
        self._attempt = attempt
        self._futures = futures
        self._outlives = outlives
        self._attempting = threading.Lock()
        self._interrupt: BaseException | None = None  # outlasts a wait that was broken off, by asyncio.run say

    def wait(self, time_left_s: Callable[[], float | None]) -> Departure:
        """Wait until all has ended or no time is left; None is for ever."""
        started = time.monotonic()
        with contextlib.closing(open_reporter()) as reporter:
            while True:
                try:
                    return self._depart(self._wait(time_left_s, reporter, lambda: False), started)
                except KeyboardInterrupt as interrupt:
                    if not self._keep(interrupt):
                        return self._leave(interrupt, started)

    async def wait_async(self, time_left_s: Callable[[], float | None]) -> Departure:
        """`wait` for asyncio and trio: cancelling neither breaks it off, nor is it forgotten."""
        started, is_left = time.monotonic(), threading.Event()
        ended: Future[bool] | None = None
        while True:
            try:
                ended = ended or self._wait_in_thread(time_left_s, is_left)
                with anyio.CancelScope(shield=True):
                    await _settled(ended)
                return self._depart(ended.result(), started)
            # Native cancellation in asyncio knows no shield.
            except (KeyboardInterrupt, anyio.get_cancelled_exc_class()) as interrupt:
                if not self._keep(interrupt):
                    is_left.set()
                    return self._leave(interrupt, started)

    def _wait_in_thread(self, time_left_s: Callable[[], float | None], is_left: threading.Event) -> Future[bool]:
        ended: Future[bool] = Future()

        def run() -> None:
            try:
                with contextlib.closing(open_reporter()) as reporter:
                    ended.set_result(self._wait(time_left_s, reporter, is_left.is_set))
            except BaseException as error:
                ended.set_exception(error)

        # A daemon, unlike the threads of an executor: it must not keep alive a process whose user has left.
        threading.Thread(target=run, name="asyncckpt-close", daemon=True).start()
        return ended

    def _wait(self, time_left_s: Callable[[], float | None], reporter: Reporter, is_left: Callable[[], bool]) -> bool:
        meter = BacklogMeter(self._futures)
        while not is_left():
            left_s = time_left_s()
            with self._attempting:
                if self._attempt(_LOOK_S if left_s is None else min(_LOOK_S, max(left_s, 0.0))):
                    return True
            if left_s is not None and left_s <= 0:
                return False
            reporter.update(meter.look())
        return False

    def _depart(self, is_closed: bool, started: float) -> Departure:
        interrupt, self._interrupt = self._interrupt, None
        return Departure(is_closed, time.monotonic() - started, interrupt=interrupt)

    def _leave(self, interrupt: BaseException, started: float) -> Departure:
        self._interrupt = None
        return Departure(False, time.monotonic() - started, is_left=True, interrupt=interrupt)

    def _keep(self, interrupt: BaseException) -> bool:
        """Whether to go on waiting after *interrupt*: the first one is kept, and the user told."""
        if self._interrupt is not None:
            return False
        self._interrupt = interrupt
        backlog = BacklogMeter(self._futures).look()
        fate = "the writer goes on by itself" if self._outlives else "what is not durable is lost then"
        _logger.warning("waiting for %s; interrupt again (Ctrl-C) to leave: %s", _to_be_durable(backlog), fate)
        return True

    def __repr__(self) -> str:
        return f"<Farewell to {[future.step for future in self._futures()]}>"


def _to_be_durable(backlog: Backlog) -> str:
    return f"{backlog.describe()} to be durable" if backlog.saves else backlog.describe()


async def _settled(ended: Future[bool]) -> None:
    wait, wake = loop_bridge()
    ended.add_done_callback(lambda _: wake())
    await wait()


def countdown(timeout: float | None) -> Callable[[], float | None]:
    """What is left of *timeout* seconds from now on; always None for None."""
    deadline = None if timeout is None else time.monotonic() + timeout
    return lambda: None if deadline is None else deadline - time.monotonic()


@contextlib.contextmanager
def quiet_if(error: BaseException | None) -> Iterator[None]:
    """Do not let a failed save, or one that takes too long, hide the exception that is already leaving the block."""
    try:
        yield
    except (CheckpointError, TimeoutError) as failure:
        if error is None:
            raise
        tell_failure(failure)


def tell_failure(failure: CheckpointError | TimeoutError) -> None:
    """Log what closing raised where it cannot be raised."""
    if isinstance(failure, CheckpointError):
        _logger.error("a checkpoint was lost: %s", failure)
    else:
        _logger.error("left before everything was durable: %s", failure)


def close_at_exit(checkpointer: Closeable) -> Callable[[], None]:
    """Close *checkpointer* when the interpreter ends, unless it is gone by then; what to unregister from `atexit`.

    `atexit` and not ``threading._register_atexit``, which runs earlier: the stager and the reader are daemon
    threads and still run, so nothing is gained, and training code that runs in a thread may not have ended.
    """
    reference = weakref.ref(checkpointer)
    owner = os.getpid()

    def close() -> None:
        found = reference()
        if found is None or os.getpid() != owner:
            return
        try:
            found.close()
        except (CheckpointError, TimeoutError) as failure:
            tell_failure(failure)
        except KeyboardInterrupt:
            return  # the process is ending anyway, and others' exit functions are still to come

    atexit.register(close)
    return close
