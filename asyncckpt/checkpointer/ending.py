"""Whether a checkpointer is open, and how it is closed."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable

from asyncckpt.checkpointer.backlog import backlog_of
from asyncckpt.checkpointer.closing import Departure, Farewell, countdown
from asyncckpt.checkpointer.failures import UnseenFailures
from asyncckpt.checkpointer.interruption import StepWatch
from asyncckpt.checkpointer.preempting import Preempting
from asyncckpt.checkpointer.saves import SaveCoordinator
from asyncckpt.errors import BusyError, ClosedError
from asyncckpt.events import EventDispatcher
from asyncckpt.future import serves_futures
from asyncckpt.repository.lock import RunLock

__all__ = ["Ending"]


class Ending:
    """Closes what belongs to one checkpointer, once.

    Args:
        saves: to be made durable first.
        preempting: limits how long that may take, and is closed.
        step_watch: is closed.
        lock: of the root; is released last.
        failures: what nobody looked at is reported in the end.
        events: hear of it.
        outlives: whether the writer goes on when this process ends.

    Attributes:
        timeout_s: how long closing waits where nobody says; None is for ever.
        at_exit: what to unregister from `atexit` when there is nothing left to close.
        is_closed: whether everything has ended.
    """

    def __init__(
        self,
        saves: SaveCoordinator,
        preempting: Preempting,
        step_watch: StepWatch,
        lock: RunLock,
        failures: UnseenFailures,
        events: EventDispatcher,
        *,
        outlives: bool,
    ) -> None:
        self._saves = saves
        self._preempting = preempting
        self._step_watch = step_watch
        self._lock = lock
        self._failures = failures
        self._events = events
        self._farewell = Farewell(saves.close, lambda: saves.futures, outlives=outlives)
        self._owner_pid = os.getpid()
        self._is_closing = False  # takes no more saves
        self.is_closed = False
        self.timeout_s: float | None = None
        self.at_exit: Callable[[], None] | None = None

    def require_open(self) -> None:
        """Refuse to go on with a checkpointer that is closed, or that belongs to another process.

        Raises:
            ClosedError: it is, or does.
        """
        if self._is_closing:
            raise ClosedError("the checkpointer is closed")
        # In a child the staging memory is not mapped: a save would be a segmentation fault.
        if os.getpid() != self._owner_pid:
            raise ClosedError(f"the checkpointer belongs to process {self._owner_pid}, of which this is a forked child")

    def close(self, timeout: float | None) -> None:
        """See `Checkpointer.close`."""
        if self._begin():
            self._end(self._farewell.wait(self._time_left(timeout)))

    async def aclose(self, timeout: float | None) -> None:
        """See `Checkpointer.aclose`."""
        if self._begin():
            self._end(await self._farewell.wait_async(self._time_left(timeout)))

    def _begin(self) -> bool:
        """Take no more saves; whether there is anything to close."""
        if self.is_closed or os.getpid() != self._owner_pid:
            return False
        if serves_futures():
            raise BusyError("a callback cannot close the checkpointer: its thread is one that closing waits for")
        self._is_closing = True
        return True

    def _time_left(self, timeout: float | None) -> Callable[[], float | None]:
        """Seconds left, asked again and again: the training may be told to stop while this waits."""
        if timeout is not None:
            return countdown(timeout)
        own_s = countdown(self.timeout_s)

        def left_s() -> float | None:
            return min((s for s in (own_s(), self._preempting.limit_s) if s is not None), default=None)

        return left_s

    def _end(self, departure: Departure) -> None:
        is_closed = departure.is_closed or (not departure.is_left and self._preempting.may_leave())
        if is_closed and not self.is_closed:
            self.is_closed = True
            self._preempting.close()
            self._step_watch.close()
            self._lock.release()
            self._events.emit("checkpointer.closed")
        if (self.is_closed or departure.is_left) and self.at_exit is not None:
            atexit.unregister(self.at_exit)
        departure.raise_interrupt()
        if not self.is_closed:
            raise self.not_durable(departure.waited_s)
        self._failures.report()

    def not_durable(self, waited_s: float) -> TimeoutError:
        """What to raise when time is up, *waited_s* seconds after waiting began: says what is outstanding."""
        backlog = backlog_of(self._saves.futures)
        what = f"steps {backlog.steps} are not durable" if backlog.saves else "the mirror is still being written"
        detail = f": {backlog.describe()}" if backlog.saves else ""
        return TimeoutError(f"{what} after {waited_s:.1f} s{detail}; the writer goes on, wait or close again")

    def __repr__(self) -> str:
        return f"<Ending {'closed' if self.is_closed else 'closing' if self._is_closing else 'open'}>"
