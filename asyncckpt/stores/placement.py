"""Where on the disk a file system puts new directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["Placement", "are_subdirectories_spread", "spread_subdirectories"]

# ioctl_iflags(2), as encoded on x86-64 and arm64; elsewhere the kernel answers ENOTTY.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000

# What mke2fs makes by default: 16 block groups of 8,192 inodes share the place that ext4 chooses for a directory.
_REGION_INODES = 16 * 8192
_MOST_REMEMBERED = 16
_FIRST_TRIES = 3
_MOST_TRIES = 8
# Times the quickest that was seen. A freed inode is skipped in about 150 ns, and making a directory takes 0.1 ms.
_SLOWER = 1.5


def spread_subdirectories(path: str) -> None:
    """Ask ext4 to put each new subdirectory of *path* into another part of the disk (``chattr +T``).

    ext4 does not reuse an inode for a minute or more after it was freed, and skips the freed ones of a
    block group one by one. A step written next to where retention has just removed one of the same
    size is created six times slower (10,000 arrays: 290 instead of 45 µs per file); see
    ``docs/decisions/012-directory-placement.md``. Best effort: other file systems refuse, and need it not.
    """
    with contextlib.suppress(OSError), _opened(path) as fd:
        flags = _flags(fd)
        if not flags & _FS_TOPDIR_FL:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _FS_TOPDIR_FL))


def are_subdirectories_spread(path: str) -> bool:
    """Whether `spread_subdirectories` worked for *path*."""
    with contextlib.suppress(OSError), _opened(path) as fd:
        return bool(_flags(fd) & _FS_TOPDIR_FL)
    return False


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _flags(fd: int) -> int:
    if sys.platform != "linux":
        raise OSError("inode flags are Linux's")
    flags: int = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))[0]
    return flags


def _region(path: str) -> int:
    return (os.stat(path).st_ino - 1) // _REGION_INODES


class Placement:
    """Makes directories where none of those it made lately is, and where making files is quick.

    Spreading alone is not enough. ext4 takes a group with the fewest directories, beginning at a hash of the
    name: often just the one that a removed step has left. Another name has another hash, so a few are tried.
    Where somebody else has removed much, it shows in how long ext4 searches for the inode of the directory.

    Args:
        region: a number for the part of the disk where a directory is.
        clock: seconds, monotonic.
    """

    def __init__(self, region: Callable[[str], int] = _region, clock: Callable[[], float] = time.perf_counter) -> None:
        self._region = region
        self._clock = clock
        self._used: deque[int] = deque(maxlen=_MOST_REMEMBERED)  # the latest last
        self._quickest_s = 0.0

    def make(self, path: str) -> None:
        """Make the directory *path*; it may differ from a plain ``mkdir`` only below `spread_subdirectories`.

        A crash may leave empty directories ``<path>~1`` and so on beside it.

        Raises:
            FileExistsError: it is there.
            OSError: it cannot be made.
        """
        took_s = self._mkdir(path)
        if not are_subdirectories_spread(os.path.dirname(path)):
            return
        with contextlib.suppress(OSError):  # one that lies in a bad place will do
            self._move_to_better(path, self._place_of(path, took_s))

    def _mkdir(self, path: str) -> float:
        """Make it; how many seconds that took."""
        started = self._clock()
        os.mkdir(path)
        return self._clock() - started

    def _place_of(self, path: str, took_s: float) -> _Place:
        region = self._region(path)
        age = self._used.index(region) + 1 if region in self._used else 0
        return _Place(age, took_s, path, region)

    def _move_to_better(self, path: str, best: _Place) -> None:
        enough_s, most_tries = _SLOWER * self._quickest_s, _MOST_TRIES
        if not self._quickest_s:  # nothing to compare with yet
            enough_s, most_tries = 0.0, _FIRST_TRIES
        others: list[str] = []
        try:
            while (best.age or best.took_s > enough_s) and len(others) < most_tries:
                other = f"{path}~{len(others) + 1}"
                took_s = self._mkdir(other)
                others.append(other)
                best = min(best, self._place_of(other, took_s))
            self._quickest_s = min(self._quickest_s or best.took_s, best.took_s)
            self._used.append(best.region)
            if best.path != path:
                os.rename(best.path, path)  # over an empty directory
                others.remove(best.path)
        finally:
            for other in others:
                os.rmdir(other)


class _Place(NamedTuple):
    """A directory that was tried; the smallest is the best.

    Attributes:
        age: 0 if nothing was made in its region lately, else higher the later it was.
        took_s: how long it took to make it.
    """

    age: int
    took_s: float
    path: str
    region: int
