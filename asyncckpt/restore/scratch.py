"""Where decoded tensors go: memory reused from restore to restore, or fresh memory the tensors own.

Restoring in place copies out of the memory at once, so one block serves every restore (and while
nothing is being saved it can be the staging arena, which is already there and faulted in).
``load`` gives its tensors away, so each large one gets a mapping of its own: dropping a tensor
frees its memory, whatever becomes of the others.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import sys
from collections.abc import Sequence
from typing import Protocol

from asyncckpt.errors import StagingMemoryError

__all__ = ["ALIGNMENT_BYTES", "FreshMemory", "Memory", "Scratch"]

ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a cache line, and enough for any SIMD kernel."""

_OWN_MAPPING_BYTES = 1 * 2**20


class Memory(Protocol):
    """What the reader decodes into."""

    def allocate(self, sizes: Sequence[int]) -> list[memoryview]:
        """One writable, aligned block of bytes per size, contents undefined.

        Raises:
            StagingMemoryError: the system has not that much memory to give.
        """


class Scratch:
    """One block of memory, reused: `allocate` invalidates what it gave out before.

    Not thread-safe; one restore at a time.

    Args:
        buffer: memory to use as long as it suffices (writable, C-contiguous), such as the staging
            arena while nothing is staged in it. The caller keeps it alive.
    """

    def __init__(self, buffer: memoryview | None = None) -> None:
        self._buffer = memoryview(b"") if buffer is None else buffer.cast("B")

    @property
    def num_bytes(self) -> int:
        """Size of the block at present."""
        return len(self._buffer)

    def allocate(self, sizes: Sequence[int]) -> list[memoryview]:
        total = sum(map(_aligned, sizes))
        if total > len(self._buffer):
            self.release()  # first, so that old and new block need not fit in memory together
            _check_available(total)
            self._buffer = _map_memory(total)
        return _carve(self._buffer, sizes)

    def release(self) -> None:
        """Let the memory go; it is freed with the last tensor over it."""
        self._buffer = memoryview(b"")

    def __repr__(self) -> str:
        return f"<Scratch {self.num_bytes / 2**20:.1f} MiB>"


class FreshMemory:
    """Memory that lives exactly as long as what is in it: own mappings for large blocks, one for all small ones."""

    def allocate(self, sizes: Sequence[int]) -> list[memoryview]:
        _check_available(sum(map(_aligned, sizes)))
        small = [size if size < _OWN_MAPPING_BYTES else 0 for size in sizes]
        views = _carve(_map_memory(sum(map(_aligned, small))), small)
        return [
            view if size < _OWN_MAPPING_BYTES else _map_memory(size) for size, view in zip(sizes, views, strict=True)
        ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _carve(block: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    starts = itertools.accumulate(map(_aligned, sizes), initial=0)
    return [block[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _map_memory(num_bytes: int) -> memoryview:
    if num_bytes == 0:
        return memoryview(bytearray())
    try:
        if sys.platform == "win32":
            return memoryview(mmap.mmap(-1, num_bytes))
        # Private, which is not Python's default: a forked child must not write into the parent's
        # tensors, and the kernel gives huge pages (an eighth of the page fault time) to these only.
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise _no_memory(num_bytes) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


def _check_available(num_bytes: int) -> None:
    """Refuse what would bring the machine to its knees: mapping succeeds, touching the pages would not."""
    available = _available_bytes()
    if available is not None and num_bytes > available:
        raise _no_memory(num_bytes, f"; {available} are available")


def _available_bytes() -> int | None:
    """Memory and swap the kernel could give out now, or ``None`` where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None


def _no_memory(num_bytes: int, detail: str = "") -> StagingMemoryError:
    return StagingMemoryError(f"restoring needs {num_bytes} bytes of memory{detail}", num_bytes=num_bytes)
