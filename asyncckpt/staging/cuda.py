"""Copies CUDA tensors into an arena: a side stream ordered after the caller's, ended by an event.

The only module that touches streams and events. ``runtime`` is ``torch.cuda`` or, in tests, a fake
that records the order of calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from asyncckpt.logs import get_logger
from asyncckpt.memory import Arena
from asyncckpt.staging.cpu import arena_view

__all__ = ["CudaCopier", "HostPinner"]

_logger = get_logger("asyncckpt.staging")
_HOST_REGISTER_PORTABLE = 1


class CudaCopier:
    """Device-to-host copies that the caller waits for (``Staging(snapshot="blocking")``).

    Args:
        runtime: the ``torch.cuda`` namespace.
    """

    def __init__(self, runtime: Any = torch.cuda) -> None:
        self._runtime = runtime
        self._streams: dict[int, Any] = {}

    def copy(self, sources: Sequence[torch.Tensor], offsets: Sequence[int], arena: Arena) -> None:
        """Copy each tensor to its offset; complete on return."""
        by_device: dict[int, list[tuple[torch.Tensor, int]]] = defaultdict(list)
        for source, offset in zip(sources, offsets, strict=True):
            if source.numel():
                by_device[source.device.index].append((source, offset))
        # All devices copy at once: every event is recorded before the first is waited for.
        events = [self._enqueue(index, items, arena) for index, items in by_device.items()]
        for event in events:
            event.synchronize()

    def _enqueue(self, index: int, items: list[tuple[torch.Tensor, int]], arena: Arena) -> Any:
        stream = self._streams.get(index)
        if stream is None:
            stream = self._streams[index] = self._runtime.Stream(device=index)
        # The kernels that produce the state were queued on the caller's stream of this device.
        stream.wait_stream(self._runtime.current_stream(index))
        with self._runtime.stream(stream):
            for source, offset in items:
                arena_view(arena, offset, source).copy_(source, non_blocking=True)
                # The allocator must not hand the memory to another stream while the copy reads it.
                source.record_stream(stream)
            event = self._runtime.Event()
            event.record(stream)
        return event


class HostPinner:
    """Page-locks arenas for CUDA, once each; falls back to pageable memory with one warning.

    Args:
        runtime: the ``torch.cuda`` namespace.
    """

    def __init__(self, runtime: Any = torch.cuda) -> None:
        self._runtime = runtime
        self._pinned: set[int] = set()
        self._refused = False

    def pin(self, arena: Arena) -> bool:
        """Pin *arena* if the driver lets us; whether it is pinned now."""
        if arena.arena_id in self._pinned:
            return True
        if self._refused:
            return False
        code = int(self._runtime.cudart().cudaHostRegister(arena.address, len(arena.buffer), _HOST_REGISTER_PORTABLE))
        if code != 0:
            self._refused = True
            _logger.warning(
                "the CUDA driver refused to pin %d bytes of staging memory (error %d); snapshots use pageable "
                "memory and are slower; raise the memlock limit",
                arena.num_bytes,
                code,
            )
            return False
        self._pinned.add(arena.arena_id)
        return True

    def unpin(self, arena: Arena) -> None:
        """Release the page lock; must run before the arena is closed."""
        if arena.arena_id in self._pinned:
            self._pinned.discard(arena.arena_id)
            self._runtime.cudart().cudaHostUnregister(arena.address)
