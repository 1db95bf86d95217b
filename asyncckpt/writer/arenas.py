"""The trainer's staging memory, as the writer sees it."""

from __future__ import annotations

from asyncckpt.memory import Arena
from asyncckpt.writer.messages import Attach, Detach

__all__ = ["Arenas"]


class Arenas:
    """The arenas that are attached, by id. Those of this process belong to the trainer, and are not closed."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}

    def __repr__(self) -> str:
        return f"Arenas({list(self._arenas.values())})"

    def buffer(self, arena_id: int) -> memoryview:
        """The memory of one arena."""
        return self._arenas[arena_id].buffer

    def attach(self, message: Attach, descriptors: list[int]) -> None:
        """Map an arena; the first of *descriptors* is its own, and is taken, unless the arena is local."""
        if message.local:
            self._arenas[message.arena_id] = Arena.find_local(message.arena_id)
        else:
            self._arenas[message.arena_id] = Arena.attach(message.arena_id, message.num_bytes, descriptors.pop(0))

    def detach(self, message: Detach) -> None:
        """Unmap an arena, to which no save refers any more."""
        _close(self._arenas.pop(message.arena_id))

    def close(self) -> None:
        """Unmap them all."""
        for arena in self._arenas.values():
            _close(arena)


def _close(arena: Arena) -> None:
    if arena.fd >= 0:  # the trainer owns the others
        arena.close()
