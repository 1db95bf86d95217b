"""The staging slots: who holds which, and what happens when all are taken."""

from __future__ import annotations

import threading
from collections.abc import Callable

from asyncckpt.memory import Arena
from asyncckpt.options import BusyMode
from asyncckpt.staging.buffers import DeviceBuffers

__all__ = ["Slot", "SlotPool"]


class Slot:
    """Room for one snapshot. Its holder alone touches ``arenas`` and ``buffers``.

    Attributes:
        index: which one it is.
        arenas: host memory that the writer sees.
        buffers: memory on CUDA devices; None before there was a tensor on one.
    """

    __slots__ = ("arenas", "buffers", "index")

    def __init__(self, index: int) -> None:
        self.index = index
        self.arenas: list[Arena] = []
        self.buffers: DeviceBuffers | None = None

    @property
    def num_bytes(self) -> int:
        """Staging memory it holds."""
        return sum(arena.num_bytes for arena in self.arenas)

    def __repr__(self) -> str:
        return f"<Slot {self.index} {self.arenas}>"


class SlotPool:
    """A fixed number of slots, handed out one at a time.

    Args:
        num_slots: how many.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots = tuple(Slot(index) for index in range(num_slots))
        self._free = list(reversed(self.slots))
        self._changed = threading.Condition()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def add(self) -> None:
        """One more slot, free, without memory yet."""
        with self._changed:
            slot = Slot(len(self.slots))
            self.slots = (*self.slots, slot)
            self._free.append(slot)
            self._changed.notify()

    def wait_free(self, timeout: float) -> bool:
        """Wait until a slot is free; whether one is after *timeout* seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._free), timeout)

    def acquire(self, when_busy: BusyMode, supersede: Callable[[], bool]) -> Slot | None:
        """Take a slot by the rule *when_busy*; None means the new save is to be skipped.

        Args:
            when_busy: see `options.Staging`.
            supersede: withdraws the newest save that the writer has not begun, if there is one;
                its slot is then released.
        """
        with self._changed:
            if self._free:
                return self._free.pop()
        if when_busy == "skip":
            return None
        if when_busy == "supersede":
            supersede()
        return self.take()

    def take(self) -> Slot:
        """Take a slot, once one is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            return self._free.pop()

    def release(self, slot: Slot) -> None:
        """Give *slot* back; its memory stays for the next snapshot."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()
