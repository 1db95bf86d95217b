"""Opens what lies below a root without following a symbolic link anywhere on the way.

``O_NOFOLLOW`` looks at the last component only: a checkpoint from elsewhere could hold a link ``state`` to a
directory of this machine and make a reader hand out files from there. Links *above* the root are
the user's own and are followed.

Linux 5.6 has one system call for it, openat2(2), which Python lacks; elsewhere the path is walked.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import struct
import sys
from collections.abc import Callable

__all__ = ["open_beneath"]

_DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC

_OPENAT2 = 437  # on every architecture that Python runs on
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08
# Old kernels do not know the call, old container runtimes forbid what they do not know.
_NO_SUCH_CALL = (errno.ENOSYS, errno.EPERM)


def open_beneath(root: str, key: str, flags: int) -> int:
    """A descriptor, close-on-exec, of *key* below the directory *root*.

    Nothing about *root* is remembered: it may be deleted, or replaced, from call to call.

    Args:
        root: an absolute path.
        key: relative to it, without empty, ``.`` and ``..`` parts; ``""`` is the root itself.
        flags: of open(2).

    Raises:
        OSError: ``ELOOP`` for a symbolic link anywhere in *key*, else what open(2) says.
    """
    base = os.open(root, _DIRECTORY)
    try:
        if not key:
            return os.open(".", flags | os.O_CLOEXEC, dir_fd=base)
        if _openat2 is not None:
            fd = _open_resolved(base, key, flags)
            if fd is not None:
                return fd
        return _open_walking(base, key, flags)
    finally:
        os.close(base)


def _load_openat2() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    call.restype = ctypes.c_long
    found: Callable[..., int] = call
    return found


_openat2 = _load_openat2()


@functools.cache
def _how(flags: int) -> bytes:
    """``struct open_how``: flags, mode, resolve."""
    return struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)


def _open_resolved(base: int, key: str, flags: int) -> int | None:
    """openat2(2), or None where there is no such call."""
    assert _openat2 is not None
    how, path = _how(flags), os.fsencode(key)
    while True:
        fd = _openat2(_OPENAT2, base, path, how, len(how))
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code in _NO_SUCH_CALL:
            return None
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), key)


def _open_walking(base: int, key: str, flags: int) -> int:
    *parents, name = key.split("/")
    fd = base
    try:
        for part in parents:
            below = _open_part(fd, part, _DIRECTORY)
            if fd != base:
                os.close(fd)
            fd = below
        return _open_part(fd, name, flags)
    finally:
        if fd != base:
            os.close(fd)


def _open_part(parent: int, name: str, flags: int) -> int:
    try:
        return os.open(name, flags | _NOFOLLOW, dir_fd=parent)
    except NotADirectoryError:  # what O_DIRECTORY makes of a link
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
        raise
