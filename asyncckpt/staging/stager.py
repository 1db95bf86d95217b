"""Takes snapshots: copies the captured tensors into a slot's arenas."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from asyncckpt.errors import CheckpointError, GraphCaptureError, SnapshotMutatedError, StagingMemoryError
from asyncckpt.memory import Arena, available_memory
from asyncckpt.options import SnapshotMode, Staging
from asyncckpt.processes import available_cpus
from asyncckpt.staging.buffers import CudaItem, DeviceBuffers
from asyncckpt.staging.cpu import CpuCopier
from asyncckpt.staging.cuda import CudaCopier, CudaOrder
from asyncckpt.staging.device_memory import DeviceBudget
from asyncckpt.staging.guard import StepGuard, is_capturing, versions_of
from asyncckpt.staging.leaf import Leaf
from asyncckpt.staging.ops import DeviceOps
from asyncckpt.staging.pinning import HostPinner
from asyncckpt.staging.plan import SegmentPlan, StagingPlan, plan_staging, signature_of
from asyncckpt.staging.slots import Slot

__all__ = ["Copies", "Stager"]

_SPARE_BYTES = 4 * 2**20


class Copies(Protocol):
    """A snapshot that may still be on its way into its arena."""

    def wait(self) -> None:
        """Wait until it is complete; call it once, before the slot is used for anything else.

        Raises:
            SnapshotMutatedError: a tensor changed before it was copied.
            StagingError: a device reported an error.
        """


class _Complete:
    def wait(self) -> None:
        return None


class Stager:
    """Owns the arenas and the cached plan.

    Used by one thread at a time, except `prepare`, whose page faulting and pinning go on in the background, and what
    `begin` returns.

    Args:
        options: limits and threads.
        shared: whether arenas must be visible to another process.
        attach: makes a new arena known to the writer.
        detach: withdraws one.
        runtime: the ``torch.cuda`` namespace.
        ops: the tensor operations on devices.
    """

    def __init__(
        self,
        options: Staging,
        *,
        shared: bool,
        attach: Callable[[Arena], None],
        detach: Callable[[Arena], None],
        runtime: Any = torch.cuda,
        ops: DeviceOps | None = None,
    ) -> None:
        self._runtime = runtime
        self._shared = shared
        self._attach = attach
        self._detach = detach
        self._mode = options.snapshot
        self._limit_bytes = None if options.memory_limit is None else options.memory_limit // options.slots
        self._cpu = CpuCopier(options.threads or available_cpus())
        self._ops = ops or DeviceOps()
        self._guard = StepGuard(runtime)
        self._cuda = CudaCopier(self._guard, runtime, self._ops)
        self._budget = DeviceBudget(runtime)
        self._pinner = HostPinner(runtime)
        self._plan: StagingPlan | None = None
        self._populating: list[threading.Thread] = []

    def require_no_capture(self) -> None:
        """Refuse to save while a CUDA graph is captured.

        Raises:
            GraphCaptureError: one is, on the current stream.
        """
        if self.is_capturing():
            raise GraphCaptureError(
                "a CUDA graph is being captured, and what it records is not executed, so there is nothing to save; "
                "save before or after the capture, or between replays"
            )

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream."""
        return is_capturing(self._runtime)

    def plan(self, leaves: Sequence[Leaf]) -> StagingPlan:
        """The layout for *leaves*; the one of the last call when nothing changed.

        Raises:
            InvalidOptionError: the memory limit cannot hold the largest tensor.
        """
        if self._plan is None or self._plan.signature != signature_of(leaves):
            self._plan = plan_staging(leaves, self._limit_bytes)
        return self._plan

    def reserve(self, slot: Slot, plan: StagingPlan) -> None:
        """Give *slot* the arenas *plan* needs, reusing those it has.

        Raises:
            StagingMemoryError: the system refused the memory.
        """
        wanted = min(len(plan.segments), 2)
        if len(slot.arenas) >= wanted and all(arena.num_bytes >= plan.arena_bytes for arena in slot.arenas):
            return
        self.discard(slot)
        for _ in range(wanted):
            self._add_arena(slot, plan.arena_bytes)

    def _add_arena(self, slot: Slot, num_bytes: int) -> None:
        try:
            arena = Arena.create(num_bytes, shared=self._shared)
        except OSError as error:
            raise StagingMemoryError(
                f"could not reserve {num_bytes} bytes of staging memory: {error}; lower "
                "Staging.slots or set Staging.memory_limit",
                errno=error.errno,
            ) from error
        self._attach(arena)
        slot.arenas.append(arena)

    def lend(self, slot: Slot, num_bytes: int) -> memoryview | None:
        """So much of the memory of *slot*, or None if it has less and is not to get that much.

        Args:
            slot: held by the caller.
            num_bytes: how much.
        """
        if not slot.arenas:
            if self._limit_bytes is not None or num_bytes > (available_memory() or num_bytes):
                return None
            try:
                # With room for what a snapshot has and a restore does not read: tensors that lie in the header.
                self._add_arena(slot, num_bytes + num_bytes // 64 + _SPARE_BYTES)
            except StagingMemoryError:
                return None
        arena = slot.arenas[0]
        return arena.buffer[:num_bytes] if arena.num_bytes >= num_bytes else None

    def prepare(
        self, slot: Slot, plan: StagingPlan, leaves: Sequence[Leaf], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Reserve for *plan* and commit (and pin) the pages in the background, ahead of the first save."""
        if not slot.arenas:  # else a save may be using them
            self.reserve(slot, plan)
        index = next((leaf.tensor.device.index for leaf in leaves if leaf.tensor.is_cuda), None)
        if index is not None and self._mode != "blocking":
            self._guard.watch(optimizers)
        for arena in slot.arenas:
            if index is not None:
                self._pinner.start(arena, index)
            else:
                thread = threading.Thread(target=arena.populate, name="asyncckpt-populate", daemon=True)
                thread.start()
                self._populating.append(thread)

    def begin(
        self,
        leaves: Sequence[Leaf],
        segment: SegmentPlan,
        slot: Slot,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> Copies:
        """Order the copies of *segment* into the first arena of *slot*; only those from CUDA devices may go on.

        Training may go on at once, as long as it changes *leaves* on the stream that is current now, on one
        ordered after it, or by a ``step()`` of *optimizers*.

        Raises:
            SnapshotMutatedError: a tensor was changed in place meanwhile (by another thread).
            StagingError: a device reported an error.
        """
        copies = self._begin(leaves, segment, slot, slot.arenas[0], self._mode, optimizers)
        if self._mode == "blocking":
            copies.wait()
            return _Complete()
        return copies

    def copy(self, leaves: Sequence[Leaf], segment: SegmentPlan, slot: Slot, arena: Arena) -> None:
        """Copy the tensors of *segment* into *arena* of *slot*; complete on return.

        Raises:
            SnapshotMutatedError: a tensor was changed in place meanwhile (by another thread).
            StagingError: a device reported an error.
        """
        self._begin(leaves, segment, slot, arena, "blocking", ()).wait()

    def _begin(
        self,
        leaves: Sequence[Leaf],
        segment: SegmentPlan,
        slot: Slot,
        arena: Arena,
        mode: SnapshotMode,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> Copies:
        part = leaves[segment.start : segment.stop]
        on_cuda = [index for index, leaf in enumerate(part) if leaf.tensor.is_cuda]
        if not on_cuda:
            self._copy_others(part, segment.offsets, arena)
            return _Complete()
        placed = [(part[index], segment.offsets[index], part[index].tensor.nbytes) for index in on_cuda]
        items = [CudaItem(leaf.key, leaf.tensor, offset, size) for leaf, offset, size in placed if size]
        self._pinner.start(arena, part[on_cuda[0]].tensor.device.index)
        self._pinner.wait(arena)
        slot.buffers = slot.buffers or DeviceBuffers(self._budget, self._ops)
        copies = self._cuda.begin(CudaOrder(items, arena, slot.buffers, mode, segment, optimizers))
        try:
            others = [index for index, leaf in enumerate(part) if not leaf.tensor.is_cuda]
            self._copy_others([part[index] for index in others], [segment.offsets[index] for index in others], arena)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                copies.wait()
            raise
        return copies

    def _copy_others(self, leaves: Sequence[Leaf], offsets: Sequence[int], arena: Arena) -> None:
        versions = versions_of([leaf.tensor for leaf in leaves])
        # Other accelerators (MPS, XPU): `cpu()` waits for their queue, which is slow but right.
        tensors = [leaf.tensor if leaf.tensor.is_cpu else leaf.tensor.cpu() for leaf in leaves]
        self._cpu.copy(tensors, offsets, arena)
        now = versions_of([leaf.tensor for leaf in leaves])
        if now == versions:
            return
        key = next(leaf.key for leaf, was, is_ in zip(leaves, versions, now, strict=True) if was != is_)
        raise SnapshotMutatedError(
            f"{key} was modified in place while it was copied; the snapshot was not written. "
            "Do not train in another thread until save() has returned",
            key=key,
        )

    def discard(self, slot: Slot) -> None:
        """Free the arenas of *slot*; writer and devices must be done with them."""
        for arena in slot.arenas:
            self._pinner.unpin(arena)
            self._detach(arena)
            arena.close()
        slot.arenas.clear()

    def close(self, slots: Sequence[Slot]) -> None:
        """Free everything, when no copy is under way; idempotent."""
        self._guard.close()
        for slot in slots:
            for arena in slot.arenas:
                self._pinner.unpin(arena)
                arena.close()
            slot.arenas.clear()
            if slot.buffers is not None:
                slot.buffers.free()
        self._cpu.close()
        for thread in self._populating:
            thread.join()
        self._populating.clear()
