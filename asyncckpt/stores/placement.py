"""Where on the disk a file system puts new directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator

__all__ = ["Placement", "are_subdirectories_spread", "spread_subdirectories"]

# ioctl_iflags(2), as encoded on x86-64 and arm64; elsewhere the kernel answers ENOTTY.
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000

# What mke2fs makes by default: 16 block groups of 8,192 inodes share the place that ext4 chooses for a directory.
_REGION_INODES = 16 * 8192
_MOST_TRIES = 8
_MOST_REMEMBERED = 16


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
    """Makes directories where none of those it made lately is.

    Spreading alone is not enough. ext4 takes a group with the fewest directories, beginning at a hash of the
    name: just the one that a removed step has left. Another name has another hash, so a few are tried.

    Args:
        region: a number for the part of the disk where a directory is.
    """

    def __init__(self, region: Callable[[str], int] = _region) -> None:
        self._region = region
        self._used: OrderedDict[int, None] = OrderedDict()  # the latest last

    def make(self, path: str) -> None:
        """Make the directory *path*; it may differ from a plain ``mkdir`` only below `spread_subdirectories`.

        A crash may leave empty directories ``<path>~1`` and so on beside it.

        Raises:
            FileExistsError: it is there.
            OSError: it cannot be made.
        """
        os.mkdir(path)
        if not are_subdirectories_spread(os.path.dirname(path)):
            return
        with contextlib.suppress(OSError):  # one that lies in the wrong place will do
            self._move_apart(path)
            self._note(self._region(path))

    def _move_apart(self, path: str) -> None:
        others: list[str] = []
        try:
            best, rank = path, self._rank(self._region(path))
            while rank and len(others) < _MOST_TRIES:
                other = f"{path}~{len(others) + 1}"
                os.mkdir(other)
                others.append(other)
                found = self._rank(self._region(other))
                if found < rank:
                    best, rank = other, found
            if best != path:
                os.rename(best, path)  # over an empty directory
                others.remove(best)
        finally:
            for other in others:
                os.rmdir(other)

    def _rank(self, region: int) -> int:
        """0 if nothing was made there, else higher the later it was."""
        return list(self._used).index(region) + 1 if region in self._used else 0

    def _note(self, region: int) -> None:
        self._used[region] = None
        self._used.move_to_end(region)
        if len(self._used) > _MOST_REMEMBERED:
            self._used.popitem(last=False)
