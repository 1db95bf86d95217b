"""Gets what is staged to disk before a deadline: plans, tells the writer, looks how it goes, plans again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from asyncckpt.checkpointer.ticket import SaveTicket
from asyncckpt.events import EventDispatcher
from asyncckpt.format.layout import CACHED_CHUNK_BYTES
from asyncckpt.logs import get_logger
from asyncckpt.preemption.bandwidth import Bandwidth
from asyncckpt.preemption.plan import FlushPlan, StagedSave, plan_flush
from asyncckpt.writer.messages import Hurry

__all__ = ["Flush", "staged_saves"]

_logger = get_logger("asyncckpt")
_INTERVAL_S = 0.25
_OBSERVE_S = 2.0  # less says more about the size of a chunk than about the storage


def staged_saves(tickets: Iterable[SaveTicket]) -> list[StagedSave]:
    """What the planner is to know of the saves of *tickets*.

    Only the one that last made progress is being written: one that was put back begins anew.
    """
    tickets = list(tickets)
    last = max(tickets, key=lambda ticket: ticket.progressed_at, default=None)
    return [
        StagedSave(
            save_id=ticket.facts.save_id,
            step=ticket.facts.step,
            raw_bytes=ticket.raw_bytes,
            done_bytes=ticket.done_bytes if ticket is last else 0,
            is_begun=ticket is last and ticket.progressed_at > 0,
            is_repeatable=not ticket.is_streamed,
        )
        for ticket in tickets
    ]


class Flush:
    """One flush, run by a thread of its own.

    Args:
        tickets: the saves that have not ended.
        hurry: tells the writer.
        bandwidth: as known from the saves before.
        time_left_s: until the deadline, which may come nearer meanwhile.
        is_complete: whether no further save is to come.
        events: hears of each new plan.
    """

    def __init__(
        self,
        tickets: Callable[[], Iterable[SaveTicket]],
        hurry: Callable[[Hurry], None],
        bandwidth: Bandwidth,
        time_left_s: Callable[[], float],
        is_complete: Callable[[], bool],
        events: EventDispatcher,
    ) -> None:
        self._tickets = tickets
        self._hurry = hurry
        self._bandwidth = bandwidth
        self._time_left_s = time_left_s
        self._is_complete = is_complete
        self._events = events
        self._plan: FlushPlan | None = None
        self._changed = threading.Event()
        self._watched: tuple[int, float, int] | None = None  # save_id, when, done bytes then

    def note_change(self) -> None:
        """A save came or ended, or the deadline moved."""
        self._changed.set()

    def run(self) -> None:
        """Return when everything is durable and nothing more is to come, or when the time is up."""
        while (left_s := self._time_left_s()) > 0:
            staged = staged_saves(self._tickets())
            if not staged and self._is_complete():
                break
            self._replan(staged, left_s)
            self._changed.wait(min(_INTERVAL_S, left_s))
            self._changed.clear()
        self._report()

    def _replan(self, staged: list[StagedSave], left_s: float) -> None:
        plan = plan_flush(staged, self._observe(staged), left_s)
        known = set() if self._plan is None else set(self._plan.lost_steps)
        follows, self._plan = plan.follows_from(self._plan), plan
        if follows:
            return
        self._hurry(Hurry(list(plan.order), plan.compress))
        for decision in plan.decisions:
            if not decision.makes_it and decision.step not in known:
                _logger.warning("step %d: %s", decision.step, decision.reason)
        if plan.decisions:
            self._events.emit(
                "preemption.flush_planned",
                time_left_s=left_s,
                compress=plan.compress,
                saves=[
                    {"step": decision.step, "makes_it": decision.makes_it, "reason": decision.reason}
                    for decision in plan.decisions
                ],
            )

    def _observe(self, staged: list[StagedSave]) -> Bandwidth:
        """What is known from before, corrected by what is seen now."""
        begun = next((save for save in staged if save.is_begun), None)
        now = time.monotonic()
        if begun is None:
            return self._bandwidth
        if self._watched is None or self._watched[0] != begun.save_id or begun.done_bytes < self._watched[2]:
            self._watched = (begun.save_id, now, begun.done_bytes)
        _, since, done_bytes = self._watched
        if now - since >= _OBSERVE_S and self._plan is not None:
            # Chunks are counted when they are taken up, so up to one more has been written.
            bytes_s = (begun.done_bytes - done_bytes + CACHED_CHUNK_BYTES / 2) / (now - since)
            self._bandwidth = self._bandwidth.as_observed(bytes_s, compress=self._plan.compress)
        return self._bandwidth

    def _report(self) -> None:
        left = sorted(ticket.facts.step for ticket in self._tickets())
        # The log first: who waits for the event may be about to leave.
        if left:
            _logger.error(
                "the time is up and steps %s are not durable; the writer goes on with them as long as it may", left
            )
        elif not self._is_complete():
            _logger.warning("the time is up and training has not reached another step(); what was staged is durable")
        else:
            _logger.info("everything staged is durable, %.1f s before the time is up", self._time_left_s())
        self._events.emit("preemption.flushed", lost_steps=left, time_left_s=max(0.0, self._time_left_s()))
