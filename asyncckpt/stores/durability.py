"""How bytes and names become durable on this operating system and file system.

Two ways, see ``docs/decisions/010-durable-files.md``:

* **syncfs**: write everything, then one ``syncfs(2)``. Its errors are trustworthy only since
  Linux 5.8 and only for a descriptor opened before the writes, and its meaning depends on the file
  system, so it is used on the few where it is known to be a full flush.
* **each**: every file is fsynced through the descriptor it was written with, before that is closed,
  and every directory at the end. A descriptor opened later may miss an error that was reported to,
  or forgotten by, somebody else in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from typing import Literal

from asyncckpt.errors import StorageError

__all__ = ["FlushMode", "SyncfsBarrier", "TreeBarrier", "choose_flush_mode", "sync_directory_path", "sync_file"]

FlushMode = Literal["syncfs", "each"]

# statfs(2) f_type of file systems whose syncfs writes everything, waits for it, and flushes the disk's
# cache. Not overlayfs (write-back errors of the upper file system do not reach its syncfs), not FUSE
# (the server is not told), not NFS and other network file systems (left to fsync, whose meaning they define).
_SYNCFS_MAGIC = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
}
_STATFS_BYTES = 256  # larger than struct statfs of any architecture; f_type is its first word


def choose_flush_mode(path: str) -> FlushMode:
    """The fastest way that is safe for files below *path*, an existing directory."""
    if sys.platform != "linux" or _linux_version() < (5, 8):
        return "each"
    return "syncfs" if _file_system_magic(path) in _SYNCFS_MAGIC else "each"


def _linux_version() -> tuple[int, ...]:
    major, minor, *_ = os.uname().release.split(".")
    digits = "".join(character for character in minor if character.isdigit())
    return int(major), int(digits or 0)


def _file_system_magic(path: str) -> int | None:
    # os.statvfs has no f_type. The first word is a C long on the architectures torch runs on.
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None).statfs(os.fsencode(path), buffer) != 0:
        return None
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def sync_file(fd: int) -> None:
    """fsync, down to the medium. On failure the file must be written anew, never fsynced again."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # macOS: fsync leaves the data in the disk's cache
    else:
        os.fsync(fd)


def sync_directory_path(path: str) -> None:
    """fsync one directory: the names in it, not what they lead to."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # CIFS and some FUSE servers have no such operation: names go to the server at once, and
        # nothing more can be asked of them. restic and SQLite do the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


class SyncfsBarrier:
    """One ``syncfs`` on a descriptor that has seen every error since before the first write."""

    def __init__(self, path: str, key: str) -> None:
        self._key = key
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def wait(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(self._fd) != 0:
            code = ctypes.get_errno()
            raise StorageError(
                f"could not flush {self._key} to disk (syncfs): {os.strerror(code)}", errno=code, key=self._key
            )

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


class TreeBarrier:
    """fsync of every directory, deepest first; the files were fsynced when they were closed."""

    def __init__(self, path: str, key: str) -> None:
        self._path = path
        self._key = key

    def wait(self) -> None:
        try:
            self._sync_tree(self._path)
        except OSError as error:
            raise StorageError.from_os_error(error, f"flush {self._key} to disk", key=self._key) from error

    def _sync_tree(self, path: str) -> None:
        with os.scandir(path) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for child in below:
            self._sync_tree(child)
        sync_directory_path(path)

    def close(self) -> None:
        """Nothing is held."""
