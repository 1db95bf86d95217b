"""What a checkpointer does when the training is told to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from asyncckpt.checkpointer.flushing import Flush
from asyncckpt.checkpointer.saves import SaveCoordinator
from asyncckpt.events import EventDispatcher
from asyncckpt.future import SaveFuture
from asyncckpt.logs import get_logger
from asyncckpt.options import Preemption
from asyncckpt.preemption.agreement import StopAgreement, agreement_of_group
from asyncckpt.preemption.bandwidth import BandwidthMeter
from asyncckpt.preemption.signals import watch_signals

__all__ = ["DEFAULT_PREEMPTION", "Preempting"]

_logger = get_logger("asyncckpt")
_EXIT_SHARE = 0.1
_POLL_S = 0.25
_AGREE_POLL_S = 0.02

DEFAULT_PREEMPTION = Preemption()


class Preempting:
    """Hears that the training is to stop, has everything staged flushed at once, and says at which step to stop.

    State: the training thread writes ``last_step`` and then reads ``is_requested``; whoever requests writes
    ``is_requested`` and then reads ``last_step``. So one of them sees the other, without a lock in every step.

    Args:
        options: None watches no signals; `request` works all the same.
        saves: what is staged.
        events: hears of it.

    Attributes:
        is_requested: the training is to stop.
        is_preempted: it was told so at a `step`, and what could be saved is staged.
        last_step: the number last given to `step`; -1 before.
    """

    def __init__(self, options: Preemption | None, saves: SaveCoordinator, events: EventDispatcher) -> None:
        self._options = options or Preemption(signals=())
        self._saves = saves
        self._events = events
        self._meter = BandwidthMeter()
        self.is_requested = False
        self.is_preempted = False
        self.last_step = -1
        self._is_closed = False
        self._newest_durable = -1
        self._killed_at = self._deadline = float("inf")
        self._cause = ""
        self._lock = threading.RLock()  # re-entrant: a signal handler of the user may call `request`
        self._flush: Flush | None = None
        self._flushing: threading.Thread | None = None
        self._wake = threading.Event()
        self._agreed = threading.Event()
        self._stop_after: int | None = None
        agreement = agreement_of_group()
        self._has_agreement = agreement is not None
        if agreement is not None:
            threading.Thread(target=self._agree, args=(agreement,), name="asyncckpt-agree", daemon=True).start()
        self._subscription = watch_signals(self._options.signals, self._hear, self._options.repeat_s)

    # -- being told ----------------------------------------------------------------------------

    def _hear(self, signum: int) -> None:
        self.request(signal.Signals(signum).name, self._options.grace_of(signum))

    def request(self, cause: str, grace_s: float | None = None) -> None:
        """The training is to stop within *grace_s*. Any thread; a further request can only shorten the time."""
        grace_s = self._options.grace_of(None) if grace_s is None else grace_s
        now = time.monotonic()
        with self._lock:
            self._killed_at = min(self._killed_at, now + grace_s)
            self._deadline = min(self._deadline, now + grace_s * (1 - _EXIT_SHARE))
            if self.is_requested:
                return
            self._cause = cause
            self._flush = Flush(
                lambda: self._saves.tickets,
                self._saves.hurry,
                self._meter.bandwidth,
                lambda: self.time_left_s,
                lambda: self.is_preempted or self._is_closed,
                self._events,
            )
            self.is_requested = True
            self._flushing = threading.Thread(
                target=self._run_flush, args=(self._flush,), name="asyncckpt-flush", daemon=True
            )
            self._flushing.start()
        self._wake.set()

    def _run_flush(self, flush: Flush) -> None:
        steps = [ticket.facts.step for ticket in self._saves.tickets]
        _logger.warning(
            "%s: training is to stop within %.1f s; flushing %s",
            self._cause,
            self.time_left_s,
            f"steps {steps}" if steps else "nothing, everything is durable",
        )
        self._events.emit("preemption.requested", cause=self._cause, time_left_s=self.time_left_s, staged_steps=steps)
        try:
            flush.run()
        except Exception:
            _logger.exception("the flush went wrong; the writer goes on with what is staged")

    @property
    def time_left_s(self) -> float:
        """Until the process should be gone; negative afterwards."""
        return self._deadline - time.monotonic()

    # -- agreeing ------------------------------------------------------------------------------

    def _agree(self, agreement: StopAgreement) -> None:
        try:
            agreement.join()
            while not self.is_requested and not agreement.is_requested():
                if self._is_closed:
                    return
                self._wake.wait(_POLL_S)
            if not self.is_requested:
                self.request("another rank")
            agreement.say(self.last_step)
            while (stop_after := agreement.stop_after()) is None and not self._is_closed:
                time.sleep(_AGREE_POLL_S)
            self._stop_after = stop_after
        except Exception as error:  # whatever a store raises when the process that serves it is gone
            if self.is_requested:
                _logger.warning("the ranks could not agree on a step to stop after: %s", error)
            else:
                _logger.debug("the store of the process group is gone: %s", error)
        self._agreed.set()

    def stops_at(self, step: int) -> bool:
        """Whether the training stops after *step*. Waits for the other ranks, for half of the time at most."""
        if not self._has_agreement:
            return True
        if not self._agreed.wait(max(0.0, self.time_left_s / 2)):
            _logger.warning("some ranks do not say how far they are; stopping after step %d without them", step)
            return True
        return self._stop_after is None or step > self._stop_after

    # -- stopping ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stopping(self, step: int) -> Iterator[None]:
        """The training stops after *step*, whatever becomes of the attempt to save it in this block."""
        try:
            yield
        finally:
            self.is_preempted = True
            self._note_change()
            self._events.emit("preemption.stopped", step)
            self._call_back(step)

    def _call_back(self, step: int) -> None:
        if self._options.on_preempted is not None:
            try:
                self._options.on_preempted(step)
            except Exception:
                _logger.exception("on_preempted failed")

    def note_end(self, future: SaveFuture, outcome: str) -> None:
        """A save has ended; called just before its future resolves."""
        if outcome == "durable":
            self._newest_durable = max(self._newest_durable, future.step)
            if not self.is_requested:  # later ones may have been written in another way
                self._meter.note(future.stats)
        self._note_change()

    def _note_change(self) -> None:
        if self._flush is not None:
            self._flush.note_change()

    # -- leaving -------------------------------------------------------------------------------

    @property
    def limit_s(self) -> float | None:
        """How long `close` may wait when nobody says how long; None is for ever.

        A process that is still there when it should have been killed has all the time again.
        """
        if not self.is_requested or time.monotonic() > self._killed_at:
            return None
        return max(0.0, self.time_left_s)

    def may_leave(self) -> bool:
        """Whether the time is up, and all that is not durable by now is older than something that is."""
        if not self.is_requested or self.time_left_s > 0:
            return False
        return all(ticket.facts.step < self._newest_durable for ticket in self._saves.tickets)

    def close(self) -> None:
        """Watch no longer; in the main thread the previous signal handlers are back."""
        self._is_closed = True
        self._wake.set()
        self._note_change()
        if self._flushing not in (None, threading.current_thread()):
            self._flushing.join()  # it tells how it went, and nothing is told after `close`
        if self._subscription is not None:
            self._subscription.close()

    def __repr__(self) -> str:
        state = "preempted" if self.is_preempted else "requested" if self.is_requested else "watching"
        return f"<Preempting {state} {self._options}>"
