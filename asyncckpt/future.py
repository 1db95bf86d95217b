"""The two ends of one save: `SaveFuture` for the caller, `SavePromise` for the machinery.

Why not ``concurrent.futures.Future``: a save has two moments to wait for (staged, durable), six
outcomes, and may be awaited from asyncio and trio, where cancelling the awaiting task must not
cancel the save (``asyncio.wrap_future`` would).

Locking: one re-entrant condition per future, held for assignments only, never while foreign code
(callbacks, event loops) runs. Re-entrant, because a signal handler of the training process may ask
a future that the interrupted frame is just changing. ``_outcome`` is written last when a save
settles, so readers that take no lock never see an outcome without its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, NoReturn

from asyncckpt.errors import BusyError, SaveCancelledError, SaveSkippedError, SaveSupersededError
from asyncckpt.logs import get_logger
from asyncckpt.model import CheckpointInfo, Outcome, SaveStats

__all__ = ["SaveFuture", "SavePromise", "loop_bridge", "serve_futures", "serves_futures"]

_logger = get_logger("asyncckpt")
_NO_STATS = SaveStats()

_this_thread = threading.local()

DoneCallback = Callable[["SaveFuture"], object]
_Wake = Callable[[], None]


def serve_futures() -> None:
    """The running thread settles futures from now on: callbacks in it must not wait for any."""
    _this_thread.serves = True


def serves_futures() -> bool:
    """Whether the running thread is one that settles futures."""
    return getattr(_this_thread, "serves", False)


class SaveFuture:
    """One save on its way to disk. Every method may be called from any thread.

    ``await future`` does what `result` does, in asyncio and in trio.

    `done` never implies success. `outcome` says what became of the save, and `result` returns for
    ``"durable"`` only:

    ================  =========================================================================
    ``"pending"``     still under way
    ``"durable"``     committed: it would survive pulling the plug
    ``"failed"``      `result` raises the original exception
    ``"skipped"``     `result` raises `SaveSkippedError`: every staging slot was taken
    ``"superseded"``  `result` raises `SaveSupersededError`: a newer save took its place
    ``"cancelled"``   `result` raises `SaveCancelledError`: `cancel` came in time
    ================  =========================================================================

    Attributes:
        step: the training step being saved.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_changed",
        "_claimed",
        "_error",
        "_error_seen",
        "_info",
        "_outcome",
        "_progress",
        "_staged",
        "_stats",
        "_traceback",
        "_wakes",
        "step",
    )

    def __init__(self, step: int) -> None:
        self.step = step
        self._changed = threading.Condition()
        self._outcome: Outcome = "pending"
        self._claimed = False
        self._staged = False
        self._progress = 0.0
        self._stats = _NO_STATS
        self._info: CheckpointInfo | None = None
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._error_seen = False
        self._callbacks: list[DoneCallback] = []
        self._wakes: list[_Wake] = []

    @property
    def outcome(self) -> Outcome:
        """What became of the save so far; see the table above."""
        return self._outcome

    @property
    def staged(self) -> bool:
        """Whether the snapshot is complete: training may free or mutate everything it saved."""
        return self._staged

    @property
    def progress(self) -> float:
        """How much of the raw bytes is written, 0.0 to 1.0."""
        return self._progress

    @property
    def stats(self) -> SaveStats:
        """What the save has cost so far."""
        return self._stats

    def done(self) -> bool:
        """Whether the save has settled, well or badly."""
        return self._outcome != "pending"

    def cancelled(self) -> bool:
        """Whether `cancel` came in time."""
        return self._outcome == "cancelled"

    def cancel(self) -> bool:
        """Give the save up, if the writer does not have it yet.

        Returns:
            True when the save is cancelled (now or before), False when it is too late.
        """
        error = SaveCancelledError(f"the save of step {self.step} was cancelled", step=self.step)
        return self._settle("cancelled", error=error, unless_claimed=True) or self.cancelled()

    def wait_staged(self, timeout: float | None = None) -> None:
        """Block until training may free or mutate everything it saved.

        Args:
            timeout: seconds to wait; ``None`` waits for ever.

        Raises:
            TimeoutError: the snapshot was not complete in time; the save goes on.
            BusyError: called from a callback, where waiting would be for ever.
            CheckpointError: the save ended before it was staged, so there is no snapshot; what is
                raised is what `result` raises.
        """
        with self._changed:
            if not (self._staged or self.done()):
                self._require_can_wait()
            if not self._changed.wait_for(lambda: self._staged or self.done(), timeout):
                raise TimeoutError(f"step {self.step} was not staged within {timeout} s")
        if not self._staged:
            self._raise_error()

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Block until the checkpoint is durable.

        Args:
            timeout: seconds to wait; ``None`` waits for ever.

        Raises:
            TimeoutError: the save had not settled in time; it goes on.
            BusyError: called from a callback, where waiting would be for ever.
            SaveSkippedError, SaveSupersededError, SaveCancelledError: the save was given up.
            Exception: whatever made the save fail, with its type.
        """
        self._wait_done(timeout)
        if self._info is None:
            self._raise_error()
        return self._info

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until the save has settled and return what `result` would raise, or ``None``.

        Raises:
            TimeoutError: the save had not settled in time; it goes on.
        """
        self._wait_done(timeout)
        self._error_seen = True
        return self._error

    def add_done_callback(self, callback: DoneCallback) -> None:
        """Call ``callback(future)`` once the save has settled; at once if it has already.

        Callbacks run in the thread that settles the save, in the order they were added. They must
        be quick and must not wait for another save. Their exceptions are logged.
        """
        with self._changed:
            if not self.done():
                self._callbacks.append(callback)
                return
        self._call(callback)

    def __await__(self) -> Generator[Any, Any, CheckpointInfo]:
        yield from self._wait_done_async().__await__()
        return self.result()

    def __repr__(self) -> str:
        if self._outcome == "durable":
            detail = f" in {self._stats.durable_s:.2f} s"
        elif self._outcome == "failed":
            detail = f" {self._error!r}"
        elif self._outcome == "pending":
            detail = f" {'staged' if self._staged else 'staging'} {self._progress:.0%}"
        else:
            detail = ""
        return f"<SaveFuture step={self.step} {self._outcome}{detail}>"

    def _wait_done(self, timeout: float | None) -> None:
        with self._changed:
            if not self.done():
                self._require_can_wait()
            if not self._changed.wait_for(self.done, timeout):
                raise TimeoutError(f"step {self.step} was not durable within {timeout} s: {self!r}")

    def _require_can_wait(self) -> None:
        if serves_futures():
            raise BusyError(
                f"a callback cannot wait for step {self.step}: the thread that called it is the one that would end the "
                "wait; add_done_callback() does not wait"
            )

    def _raise_error(self) -> NoReturn:
        error = self._error
        assert error is not None, "settled saves without an error are durable"
        self._error_seen = True
        # Raised as it came: each raise would otherwise add its frames to those of the raises before.
        raise error.with_traceback(self._traceback)

    async def _wait_done_async(self) -> None:
        wait, wake = loop_bridge()
        with self._changed:
            if self.done():
                return
            self._wakes.append(wake)
        try:
            await wait()
        finally:  # the awaiting task may have been cancelled, and the save goes on
            with self._changed, contextlib.suppress(ValueError):
                self._wakes.remove(wake)

    def _settle(
        self,
        outcome: Outcome,
        *,
        info: CheckpointInfo | None = None,
        error: BaseException | None = None,
        stats: SaveStats | None = None,
        unless_claimed: bool = False,
    ) -> bool:
        """End the save once; the first one wins and only it gets True."""
        with self._changed:
            if self.done() or (unless_claimed and self._claimed):
                return False
            self._info = info
            self._error = error
            self._traceback = None if error is None else error.__traceback__
            self._stats = stats or self._stats
            if info is not None:
                self._staged = True
                self._progress = 1.0
            self._outcome = outcome
            wakes, self._wakes = self._wakes, []
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for wake in wakes:
            wake()
        for callback in callbacks:
            self._call(callback)
        return True

    def _call(self, callback: DoneCallback) -> None:
        try:
            callback(self)
        except KeyboardInterrupt:
            raise
        except BaseException:
            # SystemExit or a CancelledError must not end the thread that settles all other saves.
            _logger.exception("a done callback of %r failed", self)


class SavePromise:
    """The producer's end of a `SaveFuture`: whoever carries a save out settles it here.

    The future is settled exactly once; methods that settle it return whether they were the ones.
    So the link to the writer, a superseding save and ``close()`` need not agree beforehand.

    Attributes:
        future: what the caller of ``save()`` got.
    """

    __slots__ = ("future",)

    def __init__(self, step: int) -> None:
        self.future = SaveFuture(step)

    def claim(self) -> bool:
        """Take the save on, before it is handed to the writer; from here `SaveFuture.cancel` is too late.

        Returns:
            False when the save has settled (was cancelled, say) and must not be handed over. True
            otherwise, every time: a restarted writer is handed the same save again.
        """
        future = self.future
        with future._changed:
            if future.done():
                return False
            future._claimed = True
            return True

    def set_staged(self, **stats: float) -> bool:
        """The snapshot is complete: training may free or mutate everything; ignored once settled.

        Args:
            stats: fields of `SaveStats` to replace along with it.

        Returns:
            Whether this call was the one to say so.
        """
        future = self.future
        with future._changed:
            if future.done() or future._staged:
                return False
            future._stats = replace(future._stats, **stats)  # type: ignore[arg-type]
            future._staged = True
            future._changed.notify_all()
            return True

    def set_progress(self, fraction: float) -> None:
        """So much of the raw bytes is written (0.0 to 1.0); ignored once settled."""
        future = self.future
        with future._changed:
            if not future.done():
                future._progress = min(max(fraction, 0.0), 1.0)

    def update_stats(self, **changes: Any) -> None:
        """Replace fields of the future's `SaveStats`; allowed after it has settled, too."""
        future = self.future
        with future._changed:
            future._stats = replace(future._stats, **changes)

    def set_result(self, info: CheckpointInfo, stats: SaveStats | None = None) -> bool:
        """The checkpoint is durable; *stats*, when given, replaces what was gathered so far."""
        return self.future._settle("durable", info=info, stats=stats)

    def set_exception(self, error: BaseException) -> bool:
        """The save failed; *error* reaches every caller as it is, and the log in case nobody asks."""
        if not self.future.done():
            _logger.error("step %d was not saved: %s", self.future.step, error)
        return self.future._settle("failed", error=error)

    def set_outcome(self, outcome: Literal["skipped", "superseded"], message: str) -> bool:
        """The save was given up by design; *message* says why and what the caller may do."""
        cls = SaveSkippedError if outcome == "skipped" else SaveSupersededError
        return self.future._settle(outcome, error=cls(message, step=self.future.step))

    def wait_done(self, timeout: float | None = None) -> None:
        """Wait until the future has settled, without looking at its error.

        Raises:
            TimeoutError: it had not within *timeout* seconds.
        """
        self.future._wait_done(timeout)

    async def wait_done_async(self) -> None:
        """`wait_done` for asyncio and trio."""
        await self.future._wait_done_async()

    def take_unseen_error(self) -> BaseException | None:
        """The error of a *failed* save nobody has looked at, once; ``None`` otherwise.

        Looked at means raised or returned by `SaveFuture.result`, `SaveFuture.exception`,
        `SaveFuture.wait_staged` or ``await``. Skipped, superseded and cancelled saves did not fail.
        """
        future = self.future
        with future._changed:
            if future._outcome != "failed" or future._error_seen:
                return None
            future._error_seen = True
            return future._error

    def __repr__(self) -> str:
        return f"<SavePromise of {self.future!r}>"


def loop_bridge() -> tuple[Callable[[], Awaitable[object]], _Wake]:
    """How the running task waits, and how any thread wakes it.

    ``sys.modules`` tells whether this can be a trio task, so trio is no dependency. anyio's own
    bridge (``anyio.from_thread``) serves only threads that anyio started.
    """
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        event: Any = trio.Event()
        call_soon = trio.lowlevel.current_trio_token().run_sync_soon
    else:
        event = asyncio.Event()
        call_soon = asyncio.get_running_loop().call_soon_threadsafe

    def wake() -> None:
        # RuntimeError: the loop has closed meanwhile, which must not hurt the settling thread.
        with contextlib.suppress(RuntimeError):
            call_soon(event.set)

    return event.wait, wake
