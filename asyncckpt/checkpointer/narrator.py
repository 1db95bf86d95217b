"""Tells what happens, as events: those of one save in the order of its life, whichever threads they come from.

A save lives in three threads: the caller's, the stager's and the one that hears the writer. A small state can be
durable before ``save()`` has returned, and "staged" should say how long that call blocked. So what happens during
the call is told at its end, in the caller's thread; after that, an event that comes while another thread is still
telling the one before is told by that thread. No lock is held while callbacks run, so they may call anything.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from asyncckpt.checkpointer.ticket import SaveFacts
from asyncckpt.errors import CheckpointError
from asyncckpt.events import Event, EventDispatcher
from asyncckpt.future import SavePromise
from asyncckpt.model import Outcome

__all__ = ["Narrator", "Story", "error_fields"]

_STAGED_STATS = ("raw_bytes", "stage_s", "blocked_s")
_DURABLE_STATS = (
    *("raw_bytes", "stored_bytes", "linked_bytes"),
    *("blocked_s", "stage_s", "encode_s", "write_s", "commit_s", "durable_s"),
    *("finite", "stale", "warnings"),
)


class _Untold(NamedTuple):
    """An event that waits. ``stats`` are read when it is told: `blocked_s` is not known before."""

    name: str
    time: float
    stats: tuple[str, ...] = ()
    fields: Mapping[str, Any] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class Story:
    """One save. ``is_held``: by the ``save()`` call, or by whoever is telling."""

    facts: SaveFacts
    promise: SavePromise
    untold: deque[_Untold] = field(default_factory=deque)
    is_held: bool = True
    is_staged: bool = False

    def add(self, entry: _Untold) -> None:
        """Tell *entry* later; a save is staged only once."""
        if entry.name == "save.staged":
            if self.is_staged:
                return
            self.is_staged = True
        self.untold.append(entry)

    def event(self, untold: _Untold) -> Event:
        """The event of *untold*, with the numbers as they are now."""
        stats = self.promise.future.stats
        values = {name: getattr(stats, name) for name in untold.stats}
        if "warnings" in values:
            values["warnings"] = list(stats.warnings)  # a tuple is no JSON
        fields = {"nonce": self.facts.nonce, **untold.fields, **values}
        return Event(untold.name, self.facts.step, untold.time, MappingProxyType(fields))


class Narrator:
    """Tells the stories of saves. Every method may be called from any thread.

    Args:
        events: where to.
    """

    def __init__(self, events: EventDispatcher) -> None:
        self._events = events
        self._lock = threading.Lock()  # guards what is in the stories
        self._stories: dict[SavePromise, Story] = {}

    def begin(self, facts: SaveFacts, promise: SavePromise) -> Story:
        """``save()`` was called; `announce` or `forget` follows when it ends."""
        story = self._stories[promise] = Story(facts, promise)
        story.add(_Untold("save.started", facts.created.timestamp(), ("blocked_s",), {"kind": facts.kind}))
        return story

    def announce(self, story: Story) -> None:
        """``save()`` returns: tell what happened meanwhile."""
        self._tell(story)

    def forget(self, story: Story) -> None:
        """``save()`` raised, which tells the caller everything."""
        self._stories.pop(story.promise, None)

    def note_staged(self, promise: SavePromise) -> None:
        """The snapshot is complete."""
        story = self._stories.get(promise)
        if story is not None:
            self._note(story, _Untold("save.staged", time.time(), _STAGED_STATS))

    def note_end(self, promise: SavePromise, outcome: Outcome, error: BaseException | None) -> None:
        """The save ended; the last that is told of it."""
        story = self._stories.pop(promise, None)
        if story is None:
            return
        now = time.time()
        if outcome == "durable":
            facts = {"kind": story.facts.kind, "path": story.facts.path}
            # The thread that handed it over may not have come to say that it was staged.
            staged = _Untold("save.staged", now, _STAGED_STATS)
            self._note(story, staged, _Untold("save.durable", now, _DURABLE_STATS, facts))
        else:
            why = {} if error is None else error_fields(error)
            elapsed_s = time.perf_counter() - story.facts.started
            self._note(story, _Untold(f"save.{outcome}", now, fields={"elapsed_s": elapsed_s, **why}))

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Tell of the exception that leaves the block, if any."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self._events.emit("restore.failed", restore_s=time.perf_counter() - started, **error_fields(error))
            raise

    def _note(self, story: Story, *untold: _Untold) -> None:
        with self._lock:
            for entry in untold:
                story.add(entry)
            if story.is_held:
                return
            story.is_held = True
        self._tell(story)

    def _tell(self, story: Story) -> None:
        try:
            while (untold := self._next(story)) is not None:
                self._events.tell(story.event(untold))
        except BaseException:  # the user's interrupt, out of a callback
            story.is_held = False
            raise

    def _next(self, story: Story) -> _Untold | None:
        with self._lock:
            if story.untold:
                return story.untold.popleft()
            story.is_held = False
            return None

    def __repr__(self) -> str:
        return f"<Narrator of {len(self._stories)} saves>"


def error_fields(error: BaseException) -> dict[str, str]:
    """How events name an error."""
    code = error.code if isinstance(error, CheckpointError) else type(error).__qualname__
    return {"error": code, "message": str(error)}
