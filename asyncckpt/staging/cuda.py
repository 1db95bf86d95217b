"""Copies CUDA tensors into an arena while the host, and as far as possible the device, goes on.

What happens on each device, in the order of the calls; ``caller`` is the stream that is current in ``save()``::

    caller:  [gather into buffer]  E                  wait(L)
    side:                            wait(E)  [loose]  L  [owned]  G  [buffer]  D
    step:                                                              wait(G)  [update]
    host, in another thread:                                                     wait(D)

*loose* are tensors that anything may change next, so the caller's stream waits for them at once. *owned* are those
that only their optimizer's step changes: its hook (`guard`) makes the stepping stream wait. What was gathered in
a buffer on the device is safe as soon as it is there, so its copy to the host comes last.

This module, `guard` and `pinning` are all that touch streams and events. ``runtime`` is ``torch.cuda`` or, in tests,
a simulation of it (``tests/unit/cuda_sim.py``) that finds every race which a missing wait makes possible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import StagingError, StagingMemoryError
from asyncckpt.memory import Arena
from asyncckpt.options import SnapshotMode
from asyncckpt.staging.buffers import CudaItem, DeviceBuffers, Gathering
from asyncckpt.staging.guard import GuardedCopies, Optimizer, Ownership, StepGuard, Watched, extent_of, versions_of
from asyncckpt.staging.ops import DeviceOps

__all__ = ["CudaCopier", "CudaCopies", "CudaOrder"]


@dataclass(frozen=True, slots=True)
class CudaOrder:
    """What to copy, and where to.

    Attributes:
        items: none of them empty.
        arena: where to; every copy waits for the device if it is not pinned.
        buffers: memory on the devices that nothing else uses before `CudaCopies.wait` has returned.
        mode: see `options.Staging`.
        layout: the same object for items of the same types and shapes in the same order.
        optimizers: those that may guard what they own.
    """

    items: Sequence[CudaItem]
    arena: Arena
    buffers: DeviceBuffers
    mode: SnapshotMode
    layout: object
    optimizers: Sequence[Optimizer] = ()


class CudaCopies:
    """Copies under way; whoever has it must `wait` before the arena, or a buffer, is used for anything else.

    Args:
        runtime: the ``torch.cuda`` namespace.
        events: by device, recorded after its last copy.
        held: what is being read.
        guard: hears that *guarded* are complete.
        guarded: what optimizers wait for; None when they need not.
    """

    def __init__(
        self, runtime: Any, events: Mapping[int, Any], held: object, guard: StepGuard, guarded: GuardedCopies | None
    ) -> None:
        self._runtime = runtime
        self._events = events
        self._held = held
        self._guard = guard
        self._guarded = guarded

    def wait(self) -> None:
        """Wait until the devices are done, without holding the GIL; call it once, in any thread.

        Raises:
            SnapshotMutatedError: a tensor changed before it was copied.
            StagingError: a device reported an error.
        """
        failure: RuntimeError | None = None
        for index, event in self._events.items():
            try:
                # A thread that has not chosen a device would make a context on device 0.
                with self._runtime.device(index):
                    event.synchronize()
            except RuntimeError as error:
                failure = error
        guarded, self._guarded, self._held = self._guarded, None, None
        mutated = None if guarded is None else self._guard.finish(guarded)
        if failure is not None:
            raise StagingError(f"the device failed while the snapshot was copied: {failure}") from failure
        if mutated is not None:
            raise mutated


class CudaCopier:
    """Queues snapshots on side streams, one per device. Used by one thread at a time.

    Args:
        guard: makes optimizers wait.
        runtime: the ``torch.cuda`` namespace.
        ops: the tensor operations.
    """

    def __init__(self, guard: StepGuard, runtime: Any, ops: DeviceOps) -> None:
        self._guard = guard
        self._runtime = runtime
        self._ops = ops
        self._streams: dict[int, Any] = {}

    def begin(self, order: CudaOrder) -> CudaCopies:
        """Queue the copies and return: the host waits for nothing if the arena is pinned.

        Raises:
            SnapshotMutatedError: another thread changed a tensor meanwhile; nothing is under way any more.
            StagingError: a device reported an error; likewise.
        """
        ownership = self._guard.take_ownership(() if order.mode == "blocking" else order.optimizers)
        tensors = [item.tensor for item in order.items]
        versions = versions_of(tensors)
        by_device: dict[int, list[int]] = {}
        for position, tensor in enumerate(tensors):
            by_device.setdefault(tensor.device.index, []).append(position)
        queues = [_DeviceQueue(self, order, index, positions, ownership) for index, positions in by_device.items()]
        try:
            for queue in queues:
                queue.fill()
            if versions_of(tensors) != versions:
                for item, version in zip(order.items, versions, strict=True):
                    Watched(item.key, item.tensor, version).check("by another thread while save() ran")
            guarded = self._guard_copies(queues, order, versions, ownership)
        except torch.OutOfMemoryError as error:
            _drain(queues)
            raise StagingMemoryError(f"the device has no memory for copying the snapshot: {error}") from error
        except RuntimeError as error:
            _drain(queues)
            raise StagingError(f"the device failed while the snapshot was copied: {error}") from error
        except BaseException:
            _drain(queues)
            raise
        return CudaCopies(self._runtime, {queue.index: queue.done for queue in queues}, tensors, self._guard, guarded)

    def _guard_copies(
        self, queues: Iterable[_DeviceQueue], order: CudaOrder, versions: Sequence[int], ownership: Ownership
    ) -> GuardedCopies | None:
        if not ownership.optimizers:
            return None
        owned = [position for queue in queues for position in queue.owned]
        by_optimizer: dict[Optimizer, list[int]] = {optimizer: [] for optimizer in ownership.optimizers}
        for number, position in enumerate(owned):
            for optimizer in ownership.owners[extent_of(order.items[position].tensor)]:
                by_optimizer[optimizer].append(number)
        events = {queue.index: queue.guard for queue in queues}
        watched = [
            Watched(order.items[position].key, order.items[position].tensor, versions[position]) for position in owned
        ]
        guarded = GuardedCopies(self._runtime, events, watched, by_optimizer)
        self._guard.add(guarded)
        return guarded

    def side_stream(self, index: int) -> Any:
        """The stream on which device *index* copies to the host; always the same."""
        stream = self._streams.get(index)
        if stream is None:
            stream = self._streams[index] = self._runtime.Stream(device=index)
        return stream


class _DeviceQueue:
    """What one snapshot does on one device.

    Attributes:
        index: the device.
        owned: positions of the items that are copied straight to the host and that an optimizer owns.
        guard: event after the last of those, and after all that training waits for; None without optimizers.
        done: event after the last copy.
    """

    def __init__(
        self, copier: CudaCopier, order: CudaOrder, index: int, positions: Sequence[int], ownership: Ownership
    ) -> None:
        self.index = index
        self.owned: list[int] = []
        self.guard: Any = None
        self.done: Any = None
        self._runtime = copier._runtime
        self._ops = copier._ops
        self._side = copier.side_stream(index)
        self._order = order
        self._positions = positions
        self._is_guarded = bool(ownership.optimizers)
        self._is_owned = [extent_of(order.items[position].tensor) in ownership.owners for position in positions]

    def fill(self) -> None:
        """Queue everything; see the picture at the top of the module."""
        items = [self._order.items[position] for position in self._positions]
        with self._runtime.device(self.index):
            caller = self._runtime.current_stream(self.index)
            gathering = self._order.buffers.choose(
                self.index, items, self._is_owned, self._order.mode, self._order.layout
            )
            self._gather(gathering, items, caller)
            # After everything that wrote the state, and after the gathering.
            self._side.wait_stream(caller)
            gathered = frozenset(gathering.packing.positions)
            rest = [local for local in range(len(items)) if local not in gathered]
            loose = [items[local] for local in rest if not self._is_owned[local]]
            self.owned = [self._positions[local] for local in rest if self._is_owned[local]]
            with self._runtime.stream(self._side):
                if loose:
                    self._download(loose)
                    caller.wait_event(self._record())
                self._download([self._order.items[position] for position in self.owned])
                if self._is_guarded:
                    # Also after what is gathered or loose: an optimizer's stream need not wait for the caller's.
                    self.guard = self._record()
                self._download_buffer(gathering)
                self.done = self._record()

    def drain(self) -> None:
        """Wait for whatever was queued, in vain if the device is broken."""
        with contextlib.suppress(RuntimeError):
            self._runtime.synchronize(self.index)

    def _gather(self, gathering: Gathering, items: Sequence[CudaItem], caller: Any) -> None:
        for views, locals_ in gathering.groups:
            sources = [items[local].tensor for local in locals_]
            self._ops.gather(views, sources)
            for source in sources:
                source.record_stream(caller)

    def _download(self, items: Iterable[CudaItem]) -> None:
        for item in items:
            self._ops.download(self._order.arena, item.offset, item.tensor)
            # A reference alone would not do: FSDP frees the memory of tensors that are still referred to.
            item.tensor.record_stream(self._side)

    def _download_buffer(self, gathering: Gathering) -> None:
        memory = gathering.memory
        if memory is None:
            return
        for run in gathering.packing.runs:
            part = memory[run.buffer_offset : run.buffer_offset + run.num_bytes]
            self._ops.download(self._order.arena, run.arena_offset, part)

    def _record(self) -> Any:
        # The waiting thread sleeps instead of spinning on a core.
        event = self._runtime.Event(blocking=True)
        event.record(self._side)
        return event


def _drain(queues: Iterable[_DeviceQueue]) -> None:
    for queue in queues:
        queue.drain()
