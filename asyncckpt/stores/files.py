"""Reading, listing and removing local files, without ever following what is not a plain file or directory."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from asyncckpt.stores.beneath import open_beneath
from asyncckpt.stores.contract import Entry

__all__ = ["at_least_one", "list_directory", "open_regular", "read_fully", "remove_tree", "write_fully"]

# A link or a FIFO that found its way into a step is refused, not followed or waited for.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


@contextlib.contextmanager
def open_regular(root: str, key: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of the regular file *key* below *root*.

    Raises:
        OSError: ``ELOOP`` for a link on the way or at its end, ``EINVAL`` (``ENXIO`` for a socket) for
            anything else that is no regular file.
    """
    fd = open_beneath(root, key, _READ)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield fd, status.st_size
    finally:
        os.close(fd)


def read_fully(fd: int, out: memoryview, offset: int) -> int:
    """Fill *out* from *offset* on; returns how many bytes there were before the end of the file."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_fully(fd: int, view: memoryview) -> None:
    """write(2) until everything is written: short writes are legal for regular files too."""
    if view.nbytes == 0:
        return  # an empty view may have a shape that cannot be cast
    view = view.cast("B")
    while view:
        view = view[at_least_one(os.write(fd, view)) :]


def at_least_one(written: int) -> int:
    """*written* unchanged; a write that accepts no byte is an error, or its caller would loop for ever."""
    if written == 0:
        raise OSError(errno.EIO, "the file system accepted no byte")
    return written


def list_directory(root: str, key: str) -> list[Entry]:
    """Everything directly in the directory *key* below *root*, sorted by name.

    Raises:
        OSError: ``ELOOP`` for a link on the way or at its end.
    """
    fd = open_beneath(root, key, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(fd) as scan:
            found = [entry for item in scan if (entry := _entry(item)) is not None]
    finally:
        os.close(fd)
    return sorted(found, key=lambda entry: entry.name)


def _entry(item: os.DirEntry[str]) -> Entry | None:
    if item.is_dir(follow_symlinks=False):
        return Entry(item.name, is_directory=True)
    try:
        status = item.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(status.st_mode):
        return Entry(item.name, is_directory=False, bytes=status.st_size)
    return Entry(item.name, is_directory=False, is_special=True)


def remove_tree(root: str, key: str) -> None:
    """Remove the file, link or directory *key* below *root*, with all below it; what is gone already is no error.

    Not ``shutil.rmtree``: it fails on a file that somebody else deleted first, unless all errors are ignored.

    Raises:
        OSError: ``ELOOP`` for a link on the way: what it leads to is not ours to delete.
    """
    path = f"{root}/{key}"
    try:
        os.close(open_beneath(root, os.path.dirname(key), os.O_RDONLY | os.O_DIRECTORY))
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # Linux, and POSIX, for a directory
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise
        _remove_directory(path)


def _remove_directory(path: str) -> None:
    # Whoever else deletes here may be ahead anywhere; that must not keep this deletion from going on elsewhere.
    try:
        with os.scandir(path) as scan:
            items = list(scan)
    except FileNotFoundError:
        return
    for item in items:
        if item.is_dir(follow_symlinks=False):
            _remove_directory(item.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(item.path)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)
