"""Aligned buffers for direct I/O, reused: a fresh 4 MiB buffer per write costs more in page faults than the write."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections import deque

__all__ = ["BLOCK_BYTES", "BUFFER_BYTES", "BufferPool", "PooledBuffer"]

BLOCK_BYTES = 4096
"""Alignment of address, length and offset that every Linux file system with O_DIRECT accepts."""

BUFFER_BYTES = 4 * 2**20

_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_WIPEONFORK = 18  # on Linux; the mmap module does not name it


class PooledBuffer:
    """A page-aligned buffer of `BUFFER_BYTES` with arbitrary contents; `release` it exactly once."""

    __slots__ = ("_free", "view")

    def __init__(self, view: memoryview, free: deque[memoryview | None]) -> None:
        self.view = view
        self._free = free

    def release(self) -> None:
        """Give the buffer back; its view must not be used any more."""
        self._free.append(self.view)


class BufferPool:
    """At most *capacity* buffers, made on first use and kept.

    `acquire` never waits: a thread that has several files open could otherwise wait for itself. Who
    gets no buffer writes through the page cache instead.

    Each buffer lies in huge pages where the kernel has some: a write then is one request to the device
    instead of one per few hundred pages. Only private mappings get them without an administrator's doing
    (``shmem_enabled``). But open(2) warns that direct I/O from a private mapping may be corrupted by a
    concurrent fork(2), and trainers fork data loader workers at any time; so a child inherits an empty
    mapping (``MADV_WIPEONFORK``), and starts with a pool of its own. Not ``MADV_DONTFORK``: the address range is
    free in the child then, and when the child lets go of the mapping it unmaps whatever else lies there by now.

    Thread safety: ``deque.pop`` and ``append`` are atomic; there is no lock that a fork could copy
    while it is held.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pid = os.getpid()
        self._free: deque[memoryview | None] = deque([None] * capacity)

    def __repr__(self) -> str:
        return f"BufferPool(capacity={self._capacity}, free={len(self._free)})"

    def acquire(self) -> PooledBuffer | None:
        """A buffer, or ``None`` when all are in use or there is no memory for another one."""
        if os.getpid() != self._pid:
            self._pid = os.getpid()
            self._free = deque([None] * self._capacity)
        try:
            view = self._free.pop()
        except IndexError:
            return None
        if view is None:
            try:
                view = _map_buffer()
            except OSError:
                self._free.append(None)
                return None
        return PooledBuffer(view, self._free)


def _map_buffer() -> memoryview:
    mapping = _map_private(BUFFER_BYTES + _HUGE_PAGE_BYTES)
    if mapping is None:
        return memoryview(mmap.mmap(-1, BUFFER_BYTES))
    with contextlib.suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % _HUGE_PAGE_BYTES
    return memoryview(mapping)[start : start + BUFFER_BYTES]


def _map_private(num_bytes: int) -> mmap.mmap | None:
    """Private memory that is safe for direct I/O; None where there is none, and shared memory has to do."""
    if sys.platform != "linux":
        return None
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(_MADV_WIPEONFORK)
    except OSError:  # before Linux 4.14
        mapping.close()
        return None
    return mapping
