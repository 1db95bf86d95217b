"""Takes snapshots: copies the captured tensors into a slot's arenas."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from asyncckpt.errors import SnapshotMutatedError, StagingMemoryError
from asyncckpt.logs import get_logger
from asyncckpt.memory import Arena
from asyncckpt.options import Staging
from asyncckpt.processes import available_cpus
from asyncckpt.staging.cpu import CpuCopier
from asyncckpt.staging.cuda import CudaCopier, HostPinner
from asyncckpt.staging.leaf import Leaf
from asyncckpt.staging.plan import SegmentPlan, StagingPlan, plan_staging, signature_of
from asyncckpt.staging.slots import Slot

__all__ = ["Stager"]

_logger = get_logger("asyncckpt.staging")


class Stager:
    """Owns the arenas and the cached plan.

    Used by one thread at a time, except `prepare`, whose page faulting goes on in the background.

    Args:
        options: limits and threads.
        shared: whether arenas must be visible to another process.
        attach: makes a new arena known to the writer.
        detach: withdraws one.
    """

    def __init__(
        self,
        options: Staging,
        *,
        shared: bool,
        attach: Callable[[Arena], None],
        detach: Callable[[Arena], None],
    ) -> None:
        self._shared = shared
        self._attach = attach
        self._detach = detach
        self._limit_bytes = None if options.memory_limit is None else options.memory_limit // options.slots
        self._cpu = CpuCopier(options.threads or available_cpus())
        self._cuda = CudaCopier()
        self._pinner = HostPinner()
        self._plan: StagingPlan | None = None
        self._populating: list[threading.Thread] = []

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
            try:
                arena = Arena.create(plan.arena_bytes, shared=self._shared)
            except OSError as error:
                raise StagingMemoryError(
                    f"could not reserve {plan.arena_bytes} bytes of staging memory: {error}; lower "
                    "Staging.slots or set Staging.memory_limit",
                    errno=error.errno,
                ) from error
            self._attach(arena)
            slot.arenas.append(arena)

    def prepare(self, slot: Slot, plan: StagingPlan) -> None:
        """Reserve for *plan* and commit the pages in the background, ahead of the first save."""
        self.reserve(slot, plan)
        for arena in slot.arenas:
            thread = threading.Thread(target=arena.populate, name="asyncckpt-populate", daemon=True)
            thread.start()
            self._populating.append(thread)

    def copy(self, leaves: Sequence[Leaf], segment: SegmentPlan, arena: Arena) -> None:
        """Copy the tensors of *segment* into *arena*; complete on return.

        Raises:
            SnapshotMutatedError: a tensor was changed in place meanwhile (by another thread).
        """
        part = leaves[segment.start : segment.stop]
        versions = [_version(leaf.tensor) for leaf in part]
        self._copy(part, segment.offsets, arena)
        for leaf, version in zip(part, versions, strict=True):
            if _version(leaf.tensor) != version:
                raise SnapshotMutatedError(
                    f"{leaf.key} was modified in place while it was copied; the snapshot was not written. "
                    "Do not train in another thread until save() has returned",
                    key=leaf.key,
                )

    def _copy(self, leaves: Sequence[Leaf], offsets: Sequence[int], arena: Arena) -> None:
        tensors = [leaf.tensor for leaf in leaves]
        on_host = [index for index, tensor in enumerate(tensors) if tensor.device.type == "cpu"]
        if len(on_host) == len(tensors):
            self._cpu.copy(tensors, offsets, arena)
            return
        on_cuda = [index for index, tensor in enumerate(tensors) if tensor.device.type == "cuda"]
        if on_cuda:
            self._pinner.pin(arena)
            self._cuda.copy([tensors[index] for index in on_cuda], [offsets[index] for index in on_cuda], arena)
        elsewhere = sorted(set(range(len(tensors))).difference(on_host, on_cuda))
        # Other accelerators (MPS, XPU): `cpu()` waits for their queue, which is slow but right.
        self._cpu.copy(
            [tensors[index].cpu() for index in (*on_host, *elsewhere)],
            [offsets[index] for index in (*on_host, *elsewhere)],
            arena,
        )

    def discard(self, slot: Slot) -> None:
        """Free the arenas of *slot*; the writer must be done with them."""
        for arena in slot.arenas:
            self._pinner.unpin(arena)
            self._detach(arena)
            arena.close()
        slot.arenas.clear()

    def close(self, slots: Sequence[Slot]) -> None:
        """Free everything; idempotent."""
        for slot in slots:
            for arena in slot.arenas:
                self._pinner.unpin(arena)
                arena.close()
            slot.arenas.clear()
        self._cpu.close()
        for thread in self._populating:
            thread.join()
        self._populating.clear()


def _version(tensor: torch.Tensor) -> int:
    # Tensors made under torch.inference_mode() have no version counter.
    return -1 if tensor.is_inference() else tensor._version
