"""Where decoded tensors go: memory reused from restore to restore, or fresh memory the tensors own.

Restoring in place copies out of the memory at once, so it borrows the staging arena, which is there already or
soon will be needed anyway. ``load`` gives its tensors away, so each large one gets a mapping of its own: dropping a
tensor frees its memory, whatever becomes of the others.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from asyncckpt.errors import StagingMemoryError
from asyncckpt.memory import aligned, machine_memory

__all__ = ["FreshMemory", "Memory", "Scratch"]

_OWN_MAPPING_BYTES = 1 * 2**20


class Memory(Protocol):
    """What the reader decodes into."""

    def allocate(self, sizes: Sequence[int]) -> list[memoryview]:
        """One writable, aligned block of bytes per size, contents undefined.

        Raises:
            StagingMemoryError: the system has not that much memory to give.
        """


class Scratch:
    """Memory for tensors that are copied out of it at once.

    Args:
        borrow: gives so many bytes of memory that is there already (writable, C-contiguous), or None. The caller
            of `allocate` is done with them before anybody else uses them.
    """

    def __init__(self, borrow: Callable[[int], memoryview | None] = lambda num_bytes: None) -> None:
        self._borrow = borrow

    def allocate(self, sizes: Sequence[int]) -> list[memoryview]:
        total = sum(map(aligned, sizes))
        buffer = self._borrow(total) if total else None
        if buffer is None:
            _check_available(total)
            buffer = _map_memory(total)
        return _carve(buffer, sizes)


class FreshMemory:
    """Memory that lives exactly as long as what is in it: own mappings for large blocks, one for all small ones."""

    def allocate(self, sizes: Sequence[int]) -> list[memoryview]:
        _check_available(sum(map(aligned, sizes)))
        small = [size if size < _OWN_MAPPING_BYTES else 0 for size in sizes]
        views = _carve(_map_memory(sum(map(aligned, small))), small)
        return [
            view if size < _OWN_MAPPING_BYTES else _map_memory(size) for size, view in zip(sizes, views, strict=True)
        ]


def _carve(block: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    starts = itertools.accumulate(map(aligned, sizes), initial=0)
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
    return machine_memory("MemAvailable", "SwapFree")


def _no_memory(num_bytes: int, detail: str = "") -> StagingMemoryError:
    return StagingMemoryError(f"restoring needs {num_bytes} bytes of memory{detail}", num_bytes=num_bytes)
