"""Host memory that trainer and writer both see: one anonymous memory file per arena.

A memfd rather than POSIX shared memory: containers give ``/dev/shm`` 64 MB and kill the process
that writes past it with SIGBUS, and a memfd has no name that could be left behind; it is freed when
the last process that holds it ends, however that process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

__all__ = [
    "ALIGNMENT_BYTES",
    "PAGE_BYTES",
    "Arena",
    "aligned",
    "available_memory",
    "is_memfd_available",
    "machine_memory",
]

PAGE_BYTES = mmap.PAGESIZE
ALIGNMENT_BYTES = 64
"""Where tensors begin that lie side by side: a cache line, so that threads which copy neighbours do not share one,
and enough for any SIMD kernel."""
_HUGE_PAGE_BYTES = 2 * 2**20
_POPULATE_STEP_BYTES = 64 * 2**20
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels answer EINVAL and the pages fault in on first use


def is_memfd_available() -> bool:
    """Whether arenas can be passed to another process by descriptor."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def aligned(num_bytes: int) -> int:
    """*num_bytes*, rounded up to a multiple of `ALIGNMENT_BYTES`."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def available_memory() -> int:
    """Bytes that may still be used, by machine and control groups; 0 where nobody says."""
    machine = machine_memory("MemAvailable")
    return max(0, min([*([] if machine is None else [machine]), *_group_memory()], default=0))


def machine_memory(*names: str) -> int | None:
    """Sum of these entries of ``/proc/meminfo`` in bytes; None where the kernel does not say."""
    table = dict(_table("/proc/meminfo"))
    try:
        return sum(table[f"{name}:"] * 1024 for name in names)
    except KeyError:
        return None


def _group_memory() -> Iterator[int]:
    """What each control group around this process (version 2 or 1) leaves; nothing without a limit."""
    for folder in _group_folders():
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                given_back = dict(_table(f"{folder}/memory.stat")).get(cache, 0)  # on demand
                yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + given_back


def _group_folders() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                own = PurePosixPath(path.lstrip("/"))
                # In a container the path may be that of the host, and only the base exists.
                yield from (Path("/sys/fs/cgroup", controllers, part) for part in (own, *own.parents))


def _table(path: str) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        for line in file:
            name, value, *_ = line.split()
            yield name, int(value)


class Arena:
    """A fixed-size block of memory, mapped in this process and perhaps in the writer.

    Ownership: the creator and every process it was attached to map it independently; each closes
    its own mapping. ``buffer`` stays valid until `close`.

    Attributes:
        arena_id: identity within the creating process.
        num_bytes: usable size.
        fd: descriptor of the memory file, or -1 for memory that only this process sees.
        buffer: the whole mapping.
    """

    _ids: ClassVar[itertools.count[int]] = itertools.count(1)
    _local: ClassVar[dict[int, Arena]] = {}

    def __init__(self, arena_id: int, num_bytes: int, fd: int, mapping: mmap.mmap) -> None:
        self.arena_id = arena_id
        self.num_bytes = num_bytes
        self.fd = fd
        self._mapping = mapping
        self._pid = os.getpid()
        self.buffer = memoryview(mapping)
        self._cancel_populate = threading.Event()

    @classmethod
    def create(cls, num_bytes: int, *, shared: bool) -> Arena:
        """Reserve *num_bytes*; pages are committed by `populate` or on first use.

        Args:
            num_bytes: usable size, at least 1.
            shared: make it passable to another process (needs `is_memfd_available`).

        Raises:
            OSError: the kernel refused the memory or the descriptor.
        """
        size = -(-max(num_bytes, 1) // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        fd = -1
        if shared:
            fd = os.memfd_create("asyncckpt-arena", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, size)
                mapping = mmap.mmap(fd, size)
            except BaseException:
                os.close(fd)
                raise
        else:
            mapping = mmap.mmap(-1, size)
        arena = cls(next(cls._ids), num_bytes, fd, mapping)
        # A forked DataLoader worker must not share (or keep alive) the staging memory.
        arena._advise(_MADV_HUGEPAGE, 0, size)
        arena._advise(_MADV_DONTFORK, 0, size)
        _created.add(arena)
        if not shared:
            cls._local[arena.arena_id] = arena
        return arena

    @classmethod
    def attach(cls, arena_id: int, num_bytes: int, fd: int) -> Arena:
        """Map an arena somebody else created; takes ownership of *fd*."""
        return cls(arena_id, num_bytes, fd, mmap.mmap(fd, os.fstat(fd).st_size))

    @classmethod
    def find_local(cls, arena_id: int) -> Arena:
        """The unshared arena of this process with that id."""
        return cls._local[arena_id]

    @property
    def address(self) -> int:
        """Address of the first byte in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def populate(self) -> bool:
        """Commit all pages now, in steps, without holding the GIL; a no-op on old kernels.

        Safe to run in a background thread while the arena is in use: it never changes contents.

        Returns:
            False when it was cancelled, by `cancel_populate` or `close`.
        """
        for start in range(0, self.num_bytes, _POPULATE_STEP_BYTES):
            if self._cancel_populate.is_set():
                return False
            length = min(_POPULATE_STEP_BYTES, self.num_bytes - start)
            if not self._advise(_MADV_POPULATE_WRITE, start, length):
                break
        return not self._cancel_populate.is_set()

    def cancel_populate(self) -> None:
        """Let a `populate` in another thread end soon; there is none after this."""
        self._cancel_populate.set()

    def _advise(self, advice: int, start: int, length: int) -> bool:
        # mmap.madvise would hold the GIL for the whole call, half a second for a large arena.
        if sys.platform != "linux":
            return False
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.madvise(ctypes.c_void_p(self.address + start), ctypes.c_size_t(length), advice) == 0)

    def close(self) -> None:
        """Drop this process's mapping and descriptor; idempotent."""
        self.cancel_populate()
        self._local.pop(self.arena_id, None)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if os.getpid() != self._pid:
            return  # there is no mapping here, see `_keep_in_child`
        try:
            self.buffer.release()
            self._mapping.close()
        except BufferError:
            # A tensor or memoryview over the arena is still alive somewhere; the mapping goes with it.
            pass

    def __repr__(self) -> str:
        kind = "memfd" if self.fd >= 0 else "local"
        return f"<Arena {self.arena_id} {kind} {self.num_bytes / 2**20:.1f} MiB>"


_created: weakref.WeakSet[Arena] = weakref.WeakSet()


def _keep_in_child() -> None:
    # Their address ranges are free here, and soon hold other memory, which would be unmapped with the last reference.
    for arena in _created:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(arena._mapping))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_in_child)
