"""Memory on the devices in which a snapshot is gathered; kept from save to save."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from asyncckpt.logs import get_logger
from asyncckpt.options import SnapshotMode
from asyncckpt.staging.device_memory import DeviceBudget
from asyncckpt.staging.ops import DeviceOps
from asyncckpt.staging.packing import SMALL_BYTES, Packing, packing_choices, plan_packing

__all__ = ["CudaItem", "DeviceBuffers", "Gathering"]

_logger = get_logger("asyncckpt.staging")
_NOTHING = Packing((), (), (), 0)


class CudaItem(NamedTuple):
    """A tensor to copy.

    Attributes:
        key: its name in the snapshot.
        tensor: any with memory.
        offset: first byte in the arena.
        num_bytes: its size; not 0.
    """

    key: str
    tensor: torch.Tensor
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Gathering:
    """Which items of a device go through a buffer, and where in it.

    Attributes:
        layout: types and shapes it was made for.
        offsets: offsets in the arena of the items it was made for.
        packing: positions and places.
        memory: the buffer; None when nothing is gathered.
        groups: views of the buffer and the positions of the items that go there, by type: one kernel copies
            many tensors, but only of one type.
    """

    layout: object
    offsets: tuple[int, ...]
    packing: Packing
    memory: torch.Tensor | None
    groups: tuple[tuple[list[torch.Tensor], list[int]], ...]


class DeviceBuffers:
    """The buffers of one slot, one per device. Its holder alone touches them.

    Args:
        budget: what all slots may take.
        ops: the tensor operations.
    """

    def __init__(self, budget: DeviceBudget, ops: DeviceOps) -> None:
        self._budget = budget
        self._ops = ops
        self._memory: dict[int, torch.Tensor] = {}
        self._gatherings: dict[int, Gathering] = {}

    def choose(
        self, index: int, items: Sequence[CudaItem], is_owned: Sequence[bool], mode: SnapshotMode, layout: object
    ) -> Gathering:
        """The best gathering for which device *index* has memory; at worst an empty one.

        Call it with that device and the stream current on which the items are gathered.

        Args:
            index: the device.
            items: all that is copied from it.
            is_owned: whether an optimizer waits for each.
            mode: see `options.Staging`.
            layout: while it is the same object, an offset belongs to the same type and shape.
        """
        sizes = [item.num_bytes for item in items]
        offsets = tuple(item.offset for item in items)
        for positions in packing_choices(mode, sizes, is_owned):
            gathering = self._plan(index, positions, offsets, sizes, layout)
            needed = gathering.packing.num_bytes
            is_small = all(sizes[position] <= SMALL_BYTES for position in positions)
            is_asked_for = mode == "device" and len(positions) == len(items)
            if not needed:
                break
            if self._reserve(index, needed, comfortably=not is_small and not is_asked_for):
                return self._place(index, gathering, items)
        self._release(index)
        return Gathering(layout, offsets, _NOTHING, None, ())

    def free(self) -> None:
        """Give all memory back; no copy may be under way."""
        for index in tuple(self._memory):
            self._release(index)

    def _plan(
        self, index: int, positions: tuple[int, ...], offsets: tuple[int, ...], sizes: Sequence[int], layout: object
    ) -> Gathering:
        known = self._gatherings.get(index)
        is_known = known is not None and known.layout is layout and known.offsets == offsets
        if known is not None and is_known and sorted(known.packing.positions) == list(positions):
            return known
        return Gathering(layout, offsets, plan_packing(positions, offsets, sizes), None, ())

    def _place(self, index: int, gathering: Gathering, items: Sequence[CudaItem]) -> Gathering:
        memory = self._memory[index]
        if gathering.memory is memory:
            return gathering
        groups: defaultdict[torch.dtype, tuple[list[torch.Tensor], list[int]]] = defaultdict(lambda: ([], []))
        for position, place in zip(gathering.packing.positions, gathering.packing.places, strict=True):
            tensor = items[position].tensor
            views, positions = groups[tensor.dtype]
            views.append(self._ops.view(memory, place, tensor))
            positions.append(position)
        placed = replace(gathering, memory=memory, groups=tuple(groups.values()))
        self._gatherings[index] = placed
        return placed

    def _reserve(self, index: int, needed: int, *, comfortably: bool) -> bool:
        held = self._held(index)
        if held >= needed and self._budget.allows(index, 0, comfortably=comfortably):
            return True
        if not self._budget.allows(index, needed - held, comfortably=comfortably):
            return False
        self._release(index)
        try:
            memory = self._ops.allocate(needed, index)
        except torch.OutOfMemoryError as error:
            # Another process took it meanwhile, or it is there in pieces only.
            _logger.info("device %d has no %d bytes for a snapshot: %s", index, needed, error)
            return False
        self._memory[index] = memory
        self._budget.note(index, needed)
        return True

    def _held(self, index: int) -> int:
        memory = self._memory.get(index)
        return 0 if memory is None else memory.numel()

    def _release(self, index: int) -> None:
        self._budget.note(index, -self._held(index))
        self._memory.pop(index, None)
        self._gatherings.pop(index, None)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{index}: {memory.numel() / 2**20:.1f} MiB" for index, memory in self._memory.items())
        return f"<DeviceBuffers {sizes}>"
