"""The saves a writer was handed and has not answered: what must be sent again if it dies, and who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from asyncckpt.errors import CheckpointError, error_from_fields
from asyncckpt.writer.messages import (
    Dropped,
    Durable,
    Failed,
    FromWriter,
    More,
    Progress,
    Released,
    Save,
    WriteStats,
)

__all__ = ["Outstanding", "OutstandingSaves", "SaveListener"]


class SaveListener(Protocol):
    """Hears about one save. Called on the thread that hears the writer; must not block."""

    def on_progress(self, done_bytes: int) -> None: ...

    def on_released(self) -> None: ...

    def on_durable(self, stats: WriteStats) -> None: ...

    def on_failed(self, error: CheckpointError) -> None: ...

    def on_dropped(self) -> None: ...


@dataclass(slots=True, eq=False)
class Outstanding:
    """One save without an answer.

    Attributes:
        listener: who waits.
        parts: what was sent of it, to be sent again.
        was_sent: the last part reached a writer.
        drop_answer: what the writer said to the last `Drop`.
        has_ended: it was answered, or given up.
    """

    listener: SaveListener
    parts: list[Save | More] = field(default_factory=list)
    was_sent: bool = False
    drop_answer: bool | None = None
    has_ended: bool = False

    @property
    def is_repeatable(self) -> bool:
        """Whether its whole snapshot is still staged."""
        return len(self.parts) == 1 and self.parts[0].last


class OutstandingSaves:
    """All of them, in the order they were handed over. Thread-safe; listeners are called without the lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._saves: dict[int, Outstanding] = {}

    def __len__(self) -> int:
        return len(self._saves)

    def __iter__(self) -> Iterator[Outstanding]:
        with self._changed:
            return iter(list(self._saves.values()))

    def add(self, save_id: int, listener: SaveListener) -> Outstanding:
        """Enter a save."""
        with self._changed:
            outstanding = self._saves[save_id] = Outstanding(listener)
            return outstanding

    def get(self, save_id: int) -> Outstanding | None:
        """The save, unless it has ended."""
        return self._saves.get(save_id)

    def pop(self, save_id: int) -> Outstanding | None:
        """Take the save out: it has ended, or is given up."""
        with self._changed:
            outstanding = self._saves.pop(save_id, None)
            if outstanding is not None:
                outstanding.has_ended = True
                self._changed.notify_all()
            return outstanding

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Block until *condition*, looked at whenever something here changes."""
        with self._changed:
            self._changed.wait_for(condition)

    def note_sent(self, outstanding: Outstanding, was_sent: bool) -> None:
        """Whether its parts so far reached a writer that was alive."""
        with self._changed:
            outstanding.was_sent = was_sent
            self._changed.notify_all()

    def fail_oldest(self, error: CheckpointError) -> None:
        """Fail the save that the writer is at: it takes them in order."""
        self._fail(list(self._saves)[:1], error)

    def fail_unrepeatable(self, error: CheckpointError) -> None:
        """Fail streamed saves, whose snapshot is gone with the segments that were reused."""
        self._fail([save_id for save_id, entry in list(self._saves.items()) if not entry.is_repeatable], error)

    def fail_all(self, error: CheckpointError) -> None:
        """Fail every save."""
        self._fail(list(self._saves), error)

    def _fail(self, save_ids: list[int], error: CheckpointError) -> None:
        for save_id in save_ids:
            if (outstanding := self.pop(save_id)) is not None:
                outstanding.listener.on_failed(error)

    def answer(self, message: FromWriter) -> None:
        """Pass an answer on to the save it is about; other messages, and saves that have ended, are ignored."""
        match message:
            case Progress(save_id=save_id, done_bytes=done_bytes):
                if (outstanding := self.get(save_id)) is not None:
                    outstanding.listener.on_progress(done_bytes)
            case Released(save_id=save_id):
                if (outstanding := self.get(save_id)) is not None:
                    outstanding.listener.on_released()
            case Durable(save_id=save_id, stats=stats):
                if (outstanding := self.pop(save_id)) is not None:
                    outstanding.listener.on_durable(stats)
            case Failed(save_id=save_id, error=error):
                if (outstanding := self.pop(save_id)) is not None:
                    outstanding.listener.on_failed(error_from_fields(error))
            case Dropped(save_id=save_id, withdrawn=withdrawn):
                self._answer_drop(save_id, withdrawn)

    def _answer_drop(self, save_id: int, withdrawn: bool) -> None:
        with self._changed:
            outstanding = self._saves.get(save_id)
            if outstanding is None:
                return
            outstanding.drop_answer = withdrawn
            self._changed.notify_all()
        if withdrawn:
            self.pop(save_id)
            outstanding.listener.on_dropped()
