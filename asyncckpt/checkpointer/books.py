"""What a checkpointer knows of its saves and steps: one entry per save, from its begin to its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from asyncckpt.checkpointer.deciding import SaveDecider
from asyncckpt.checkpointer.describing import checked_step
from asyncckpt.checkpointer.failures import UnseenFailures
from asyncckpt.checkpointer.mirror import MirrorView
from asyncckpt.checkpointer.narrator import Narrator, error_fields
from asyncckpt.checkpointer.tally import Tally
from asyncckpt.checkpointer.ticket import SaveFacts
from asyncckpt.errors import StepExistsError
from asyncckpt.events import EventDispatcher
from asyncckpt.future import SaveFuture, SavePromise
from asyncckpt.model import CheckpointInfo, Outcome, Statistics
from asyncckpt.policies.when import When
from asyncckpt.writer.client import GaveUp, Replaced, WriterNews
from asyncckpt.writer.messages import MirrorEvent, MirrorState, Pruned

__all__ = ["Books"]


class Books:
    """Has every begin and end entered where it counts: the decider, the statistics, the events, the failures.

    Args:
        when: the policy of `Checkpointer`.
        load_saved: metrics by step of the checkpoints there are.
        failures: where failed saves go.
        mirror: hears the writer's news of the mirror.
        events: told everything.

    Attributes:
        steps: committed or being saved. The thread that trains adds to it; others only remove.
        decider: asks the policy.
        narrator: tells events.
    """

    def __init__(
        self,
        when: When | None,
        load_saved: Callable[[], dict[int, Mapping[str, float]]],
        failures: UnseenFailures,
        mirror: MirrorView,
        events: EventDispatcher,
    ) -> None:
        self.steps: set[int] = set()
        self.decider = SaveDecider(when, load_saved)
        self.narrator = Narrator(events)
        self._failures = failures
        self._mirror = mirror
        self._events = events
        self._tally = Tally()

    def require_new(self, step: int, location: str) -> int:
        """*step*, if it can be saved in the root at *location*.

        Raises:
            InvalidOptionError: it is no step.
            StepExistsError: it is committed already, or being saved.
        """
        if checked_step(step) in self.steps:
            raise StepExistsError(
                f"step {step} is already saved in {location}; delete it first or save another step", step=step
            )
        return step

    @contextlib.contextmanager
    def entry(self, facts: SaveFacts) -> Iterator[SavePromise]:
        """A save that is begun in the block; nothing is left of it when the block raises."""
        self.steps.add(facts.step)
        promise = SavePromise(facts.step)
        story = self.narrator.begin(facts, promise)
        try:
            yield promise
        except BaseException:
            self.steps.discard(facts.step)
            self.narrator.forget(story)
            raise
        future = promise.future
        self.decider.note_begun(future, facts.metrics)
        future.add_done_callback(self._forget_cancelled)
        self._tally.note_save(future.stats)
        self.narrator.announce(story)

    def _forget_cancelled(self, future: SaveFuture) -> None:
        # A cancelled future settles before the machinery notices, and its step may be saved again at once.
        if future.cancelled():
            self.steps.discard(future.step)

    def note_end(self, promise: SavePromise, outcome: Outcome, error: BaseException | None) -> None:
        """A save ended; its future resolves after this."""
        future = promise.future
        if outcome != "durable":
            self.steps.discard(future.step)
        if outcome == "failed":
            self._failures.add(promise)
        self._tally.note_end(future.step, outcome, future.stats)
        self.narrator.note_end(promise, outcome, error)

    def note_restored(self, found: CheckpointInfo, restore_s: float) -> None:
        """The live state is that of *found* now."""
        self.steps.difference_update(found.fell_back_from)
        self.decider.note_restored(found.step)
        self._tally.note_restore(found, restore_s)
        self._events.emit(
            "restore.done",
            found.step,
            restore_s=restore_s,
            raw_bytes=found.raw_bytes,
            fell_back_from=list(found.fell_back_from),
            from_mirror=found.from_mirror,
        )

    def note_deleted(self, step: int) -> None:
        """The user removed *step*."""
        self.steps.discard(step)
        self.decider.note_removed(step)
        self._events.emit("checkpoint.deleted", step)

    def note_news(self, news: WriterNews) -> None:
        """The writer says something that is about no save; called in the thread that hears it."""
        match news:
            case Pruned(steps=steps, reasons=reasons):
                self.steps.difference_update(steps)
                self.decider.note_removed(*steps)
                self._tally.note_pruned(len(steps))
                for step, reason in zip(steps, reasons, strict=True):
                    self._events.emit("checkpoint.pruned", step, reason=reason)
            case MirrorEvent() | MirrorState():
                self._mirror.hear(news)
            case Replaced(reason=reason, pid=pid):
                self._tally.note_writer_restart()
                self._events.emit("writer.restarted", reason=reason, writer_pid=pid)
            case GaveUp(error=error):
                self._events.emit("writer.failed", **error_fields(error))

    def statistics(self) -> Statistics:
        """See `Checkpointer.statistics`."""
        return self._mirror.complete_statistics(replace(self._tally.statistics, policy=self.decider.explain()))

    def __repr__(self) -> str:
        return f"<Books of {len(self.steps)} steps>"
