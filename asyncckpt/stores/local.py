"""Checkpoints in a local directory."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from asyncckpt.errors import CheckpointNotFoundError, InvalidOptionError, StorageError
from asyncckpt.stores.buffers import BufferPool
from asyncckpt.stores.contract import Barrier, Entry, StoreProperties
from asyncckpt.stores.durability import (
    FlushMode,
    SyncfsBarrier,
    TreeBarrier,
    choose_flush_mode,
    sync_directory_path,
    sync_file,
)
from asyncckpt.stores.files import list_directory, open_regular, read_fully, remove_tree, write_fully
from asyncckpt.stores.placement import Placement
from asyncckpt.stores.sinks import LARGE_BYTES, O_DIRECT, LocalSink

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LocalStore", "local_path", "open_store"]

_POOL_BUFFERS = 16  # 64 MiB at most; one is used per large file being written
_BAD_KEY = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|\0")  # an empty, "." or ".." part, or a NUL
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC


class LocalStore:
    """See `contract.Store`; *root* must exist for anything but construction.

    Files from `LARGE_BYTES` on are written with O_DIRECT where the file system takes it, else through
    the page cache and then dropped from it. Nothing is cached about what exists below the root, so
    other processes may delete there at any time.

    Args:
        root: the directory; made absolute at once, so a later ``chdir`` does not matter.
        flush: how to make files durable; ``None`` chooses by kernel and file system.
        direct: whether to try O_DIRECT at all.
    """

    properties = StoreProperties(atomic_create=True, hard_links=True, rename=True)

    def __init__(self, root: str | os.PathLike[str], *, flush: FlushMode | None = None, direct: bool = True) -> None:
        self.root = os.path.abspath(root)
        self._requested_flush = flush
        self._direct = direct and bool(O_DIRECT)
        self._pool = BufferPool(_POOL_BUFFERS)
        self._placement = Placement()

    def __repr__(self) -> str:
        return f"LocalStore({self.root!r}, flush={self.flush!r})"

    @property
    def url(self) -> str:
        return Path(self.root).as_uri()

    @cached_property
    def flush(self) -> FlushMode:
        """How files are made durable."""
        return self._requested_flush or choose_flush_mode(self.root)

    def location(self, key: str) -> str:
        return f"{self.root}/{self._checked(key)}" if key else self.root

    def _checked(self, key: str) -> str:
        if key and _BAD_KEY.search(key):
            raise InvalidOptionError(f"{key!r} is not a key inside {self.root}", key=key)
        return key

    # Writing

    def put(self, key: str, data: Buffer, *, durable: bool = False) -> None:
        view = memoryview(data)
        is_synced = durable or self.flush == "each"
        if view.nbytes >= LARGE_BYTES:
            with self._open_sink(key, view.nbytes, is_synced=is_synced) as sink:
                sink.write(view)
            return
        path = self.location(key)
        with _reported("write", key):
            fd = self._open_new(path, _CREATE)
            try:
                write_fully(fd, view)
                if is_synced:
                    sync_file(fd)
            finally:
                os.close(fd)

    def create(self, key: str, size_hint: int = 0) -> LocalSink:
        return self._open_sink(key, size_hint, is_synced=self.flush == "each")

    def _open_sink(self, key: str, size_hint: int, *, is_synced: bool) -> LocalSink:
        path = self.location(key)
        staging = self._pool.acquire() if self._direct and size_hint >= LARGE_BYTES else None
        with _reported("create", key):
            if staging is not None:
                try:
                    fd = self._open_new(path, _CREATE | O_DIRECT)
                    return LocalSink(fd, path, key, staging, is_synced=is_synced)
                except BaseException as error:
                    staging.release()
                    if not (isinstance(error, OSError) and error.errno == errno.EINVAL):
                        raise
                    # The file system refuses O_DIRECT, but may have created the file before it noticed.
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            return LocalSink(self._open_new(path, _CREATE), path, key, None, is_synced=is_synced)

    def _open_new(self, path: str, flags: int) -> int:
        try:
            return os.open(path, flags, 0o666)
        except FileNotFoundError:
            self._make_directory(os.path.dirname(path))
            return os.open(path, flags, 0o666)

    def _make_directory(self, path: str) -> None:
        """mkdir -p below the root, which itself is never recreated: it was deleted for a reason."""
        if len(path) <= len(self.root):
            os.stat(self.root)  # raises when it is gone
            return
        try:
            os.mkdir(path)
        except FileExistsError:
            pass
        except FileNotFoundError:
            self._make_directory(os.path.dirname(path))
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)

    def _make_area(self, path: str) -> None:
        try:
            self._placement.make(path)
        except FileExistsError:
            pass
        except FileNotFoundError:
            self._make_directory(path)

    def link(self, source: str, target: str) -> None:
        source_path, path = self.location(source), self.location(target)
        with _reported("link", target):
            try:
                os.link(source_path, path, follow_symlinks=False)
            except FileNotFoundError:
                self._make_directory(os.path.dirname(path))
                os.link(source_path, path, follow_symlinks=False)

    # Reading

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with _reported("read", key), open_regular(self.root, self._checked(key)) as (fd, size):
            rest = max(size - offset, 0)
            wanted = rest if length is None else min(length, rest)
            data = os.pread(fd, wanted, offset)
            if len(data) == wanted:
                return data
            more = bytearray(wanted - len(data))
            return data + more[: read_fully(fd, memoryview(more), offset + len(data))]

    def read_into(self, key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        with _reported("read", key), open_regular(self.root, self._checked(key)) as (fd, size):
            if offset == 0 and len(out) < size and hasattr(os, "posix_fadvise"):
                # Who reads the first block wants the others too: the disk fetches them while this one is decoded.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            count = read_fully(fd, out.cast("B"), offset)
            if not cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)
            return count

    def entries(self, prefix: str) -> list[Entry]:
        with _reported("list", prefix):
            try:
                return list_directory(self.root, self._checked(prefix))
            except FileNotFoundError:
                return []

    # Removing, moving, making durable

    def delete(self, prefix: str) -> None:
        if not prefix:
            raise InvalidOptionError(f"refusing to delete the whole root {self.root}")
        with _reported("delete", prefix):
            remove_tree(self.root, self._checked(prefix))

    def open_barrier(self, prefix: str) -> Barrier:
        path = self.location(prefix)
        with _reported("create", prefix):
            self._make_area(path)
            return SyncfsBarrier(path, prefix) if self.flush == "syncfs" else TreeBarrier(path, prefix)

    def sync_directory(self, prefix: str) -> None:
        with _reported("flush", prefix):
            sync_directory_path(self.location(prefix))

    def rename(self, source: str, target: str) -> None:
        with _reported("rename", source):
            os.rename(self.location(source), self.location(target))


@contextlib.contextmanager
def _reported(verb: str, key: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.from_os_error(error, f"{verb} {key or 'the checkpoint root'}", key=key) from error


def local_path(url_or_path: str | os.PathLike[str]) -> str:
    """The absolute local path that *url_or_path* names.

    Raises:
        InvalidOptionError: it names another kind of store, or another host.
    """
    text = os.fspath(url_or_path)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return os.path.abspath(text)
    parts = urlsplit(text)
    if scheme[1].lower() != "file":
        raise InvalidOptionError(f"cannot open {text!r}: only paths and file:// URLs are available", url=text)
    if parts.netloc not in ("", "localhost"):
        raise InvalidOptionError(f"cannot open {text!r}: a file:// URL must name this host", url=text)
    return os.path.abspath(unquote(parts.path))


def open_store(url_or_path: str | os.PathLike[str]) -> LocalStore:
    """The existing store at *url_or_path*: a path, or a ``file://`` URL.

    Raises:
        InvalidOptionError: a scheme that is not available.
        CheckpointNotFoundError: there is no such directory.
        StorageError: nobody can tell (``EACCES``, ``EIO``, ``ESTALE``, ...).
    """
    path = local_path(url_or_path)
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        is_directory = False
    except OSError as error:
        raise StorageError.from_os_error(error, f"open the checkpoint root {path}", path=path) from error
    if not is_directory:
        raise CheckpointNotFoundError(f"there is no checkpoint root at {path}", path=path)
    return LocalStore(path)
