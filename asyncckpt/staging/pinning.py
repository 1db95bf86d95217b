"""Page-locks staging memory for CUDA, off the critical path."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from asyncckpt.logs import get_logger
from asyncckpt.memory import Arena

__all__ = ["HostPinner"]

_logger = get_logger("asyncckpt.staging")
_HOST_REGISTER_PORTABLE = 1


class HostPinner:
    """Pins arenas, once each; falls back to pageable memory with one warning.

    The driver is called in a thread of its own. A refused call leaves an error behind that belongs to
    the thread, and torch would report it at the next kernel that this thread starts: in the trainer's
    thread that is training.

    Args:
        runtime: the ``torch.cuda`` namespace.
    """

    def __init__(self, runtime: Any = torch.cuda) -> None:
        self._runtime = runtime
        self._threads: dict[int, threading.Thread] = {}
        # Device whose context pinned the arena, by arena. Written by the threads, read once they have ended.
        self._pinned: dict[int, int] = {}
        self._is_refused = False

    def start(self, arena: Arena, index: int) -> None:
        """Commit and pin *arena* in the background, unless that was begun before.

        Args:
            arena: what to pin, for all devices.
            index: a device that is in use: a thread would otherwise make a context on device 0.
        """
        if arena.arena_id not in self._threads:
            thread = threading.Thread(target=self._pin, args=(arena, index), name="asyncckpt-pin", daemon=True)
            self._threads[arena.arena_id] = thread
            thread.start()

    def wait(self, arena: Arena) -> bool:
        """Whether *arena* is pinned, once that is decided."""
        self._threads[arena.arena_id].join()
        return arena.arena_id in self._pinned

    def unpin(self, arena: Arena) -> None:
        """Release the page lock; must run before the arena is closed, when no copy into it is under way."""
        thread = self._threads.pop(arena.arena_id, None)
        if thread is None:
            return
        arena.cancel_populate()
        thread.join()
        index = self._pinned.pop(arena.arena_id, None)
        if index is not None:
            _run_in_thread(lambda: self._unregister(arena, index))

    def _pin(self, arena: Arena, index: int) -> None:
        # First, without the driver's lock: it would have to fault the pages in itself, and hold up kernels meanwhile.
        if self._is_refused or not arena.populate():
            return
        try:
            with self._runtime.device(index):
                code = int(
                    self._runtime.cudart().cudaHostRegister(arena.address, len(arena.buffer), _HOST_REGISTER_PORTABLE)
                )
            why = f"error {code}" if code else ""
        except RuntimeError as error:
            why = str(error)
        if not why:
            self._pinned[arena.arena_id] = index
        elif not self._is_refused:
            self._is_refused = True
            _logger.warning(
                "the CUDA driver refused to pin %d bytes of staging memory (%s): save() waits until the snapshot is "
                "copied, and more slowly; raise the memlock limit (ulimit -l)",
                arena.num_bytes,
                why,
            )

    def _unregister(self, arena: Arena, index: int) -> None:
        with self._runtime.device(index):
            code = int(self._runtime.cudart().cudaHostUnregister(arena.address))
        if code:
            _logger.error("the CUDA driver refused to release %r (error %d)", arena, code)


def _run_in_thread(action: Callable[[], None]) -> None:
    thread = threading.Thread(target=action, name="asyncckpt-unpin")
    thread.start()
    thread.join()
