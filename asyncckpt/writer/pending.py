"""The saves that were received and have not ended: which one is written next, and which one has to wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from asyncckpt.writer.messages import More, Save

__all__ = ["PendingSave", "PendingSaves"]

_MANY_PARTS = 1_000_000  # no sender may ever wait: it is the task that hears the trainer


class PendingSave:
    """A save received but not ended; its parts arrive in a stream.

    Attributes:
        save: the first part.
        has_begun: it is being written.
        num_attempts: how often that was tried, also before it was put back: each attempt has a directory of its own.
        receive: the parts, from the first to the last one.
    """

    def __init__(self, save: Save) -> None:
        self.save = save
        self.has_begun = False
        self.num_attempts = 0
        self._send, self.receive = anyio.create_memory_object_stream[Save | More](_MANY_PARTS)
        self.add(save)

    @property
    def is_streamed(self) -> bool:
        """Whether parts of it are gone once they were written, so that it cannot begin anew."""
        return not self.save.last

    def add(self, part: Save | More) -> None:
        """One more part came."""
        self._send.send_nowait(part)
        if part.last:
            self.end()

    def end(self) -> None:
        """No part is to come any more, complete or not."""
        self._send.close()

    def close(self) -> None:
        """Let go of the stream."""
        self._send.close()
        self.receive.close()

    def __repr__(self) -> str:
        state = "being written" if self.has_begun else "waiting"
        return f"<PendingSave {self.save.save_id} of step {self.save.step}, {state}>"


class PendingSaves:
    """All of them, oldest first unless a `Hurry` says otherwise; one is written at a time.

    State: touched by the event loop only.
    """

    def __init__(self) -> None:
        self._saves: dict[int, PendingSave] = {}
        self._order: dict[int, int] = {}  # places of save_ids
        self._has_ended = False
        self._changed = anyio.Event()
        self._current: PendingSave | None = None

    def __len__(self) -> int:
        return len(self._saves)

    def __repr__(self) -> str:
        return f"PendingSaves({list(self._saves.values())})"

    @property
    def current(self) -> PendingSave | None:
        """The one that is being written."""
        return self._current

    # -- what the trainer says ---------------------------------------------------------------------

    def add(self, save: Save) -> None:
        """A save came."""
        self._saves[save.save_id] = PendingSave(save)
        self._changed.set()

    def add_part(self, part: More) -> None:
        """A further part of a save came. Those of one that failed meanwhile are no longer wanted."""
        if (pending := self._saves.get(part.save_id)) is not None:
            pending.add(part)

    def drop(self, save_id: int) -> bool:
        """Withdraw a save that has not begun; whether it was withdrawn.

        A snapshot that is still being streamed ends here, incomplete, and is not committed.
        """
        pending = self._saves.get(save_id)
        if pending is None:
            return False
        pending.end()
        if pending.has_begun:
            return False
        del self._saves[save_id]
        pending.close()
        return True

    def reorder(self, order: Sequence[int]) -> None:
        """From now on the saves with these ids go first, in this order."""
        self._order = {save_id: place for place, save_id in enumerate(order)}

    def end(self) -> None:
        """Nothing more comes."""
        self._has_ended = True
        self._changed.set()
        for pending in self._saves.values():
            pending.end()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self._has_ended

    # -- what is written when ----------------------------------------------------------------------

    async def begin_next(self) -> PendingSave | None:
        """Begin the save that is to be written now, waiting for one to come; None when all are done and none comes."""
        while (pending := self._first_waiting()) is None:
            if self._has_ended:
                return None
            self._changed = anyio.Event()
            await self._changed.wait()
        pending.has_begun = True
        self._current = pending
        return pending

    def is_late(self) -> bool:
        """Whether the save that is being written is to be put back: another one was ordered before it."""
        current, first = self._current, self._first_waiting()
        if current is None or current.is_streamed or first is None:
            return False
        places = [self._order.get(pending.save.save_id) for pending in (first, current)]
        return places[0] is not None and places[1] is not None and places[0] < places[1]

    def put_back(self) -> None:
        """The current save waits again, and is written from its beginning when its turn comes."""
        if self._current is not None:
            self._current.has_begun = False
            self._current = None

    def end_current(self) -> None:
        """The current save is durable or has failed."""
        if self._current is not None:
            del self._saves[self._current.save.save_id]
            self._current.close()
            self._current = None

    def close(self) -> None:
        """Let go of whatever has not ended."""
        for pending in self._saves.values():
            pending.close()

    def _first_waiting(self) -> PendingSave | None:
        waiting = [pending for pending in self._saves.values() if not pending.has_begun]
        return min(waiting, key=lambda pending: self._order.get(pending.save.save_id, len(self._order)), default=None)
