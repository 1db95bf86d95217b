"""How much memory of a device a snapshot may take without getting in the way of training."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

__all__ = ["DeviceBudget", "DeviceMemory", "fits"]

_MARGIN = 0.1
_KNOWN_PEAK = 1.05


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device and its allocator say, in bytes.

    Attributes:
        free: what nobody has.
        reserved: what torch's allocator has, in use or not.
        in_use: what is in use, buffers of snapshots left out.
        training_peak: the most that was ever in use, likewise.
    """

    free: int
    reserved: int
    in_use: int
    training_peak: int


def fits(num_bytes: int, memory: DeviceMemory, *, comfortably: bool) -> bool:
    """Whether the buffers of all snapshots may have *num_bytes* together.

    A snapshot is taken between two steps, when memory is emptiest, and keeps its buffer during the next
    one: what counts is what training leaves at its peak, not what is free now.

    Args:
        num_bytes: bytes of all buffers.
        memory: see there.
        comfortably: leave a tenth of the device free as well, and do not trust a peak that is no more
            than what is in use now: nothing was trained yet.
    """
    if comfortably and memory.training_peak < _KNOWN_PEAK * memory.in_use:
        return False
    total = memory.free + memory.reserved
    margin = _MARGIN * total if comfortably else 0
    return num_bytes + max(memory.training_peak, memory.in_use) + margin <= total


class DeviceBudget:
    """Counts the snapshot buffers of all slots, and remembers what training takes at its peak.

    Used by one thread at a time.

    Args:
        runtime: the ``torch.cuda`` namespace.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._buffers: defaultdict[int, int] = defaultdict(int)
        self._training_peaks: dict[int, int] = {}

    def note(self, index: int, num_bytes: int) -> None:
        """A buffer of so many bytes was allocated on device *index*; negative: freed."""
        self._buffers[index] += num_bytes

    def allows(self, index: int, more: int, *, comfortably: bool) -> bool:
        """Whether the buffers on device *index* may have *more* bytes than now; see `fits`."""
        buffers = self._buffers[index]
        free, _ = self._runtime.mem_get_info(index)
        # Buffers stay allocated between saves, so whatever peak came after them includes them.
        peak = self._runtime.max_memory_allocated(index) - buffers
        peak = self._training_peaks[index] = max(self._training_peaks.get(index, 0), peak)
        memory = DeviceMemory(
            free=free,
            reserved=self._runtime.memory_reserved(index),
            in_use=self._runtime.memory_allocated(index) - buffers,
            training_peak=peak,
        )
        return fits(buffers + more, memory, comfortably=comfortably)

    def __repr__(self) -> str:
        return f"<DeviceBudget {dict(self._buffers)}>"
