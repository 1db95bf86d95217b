"""One local file being written: directly from aligned buffers, or through the page cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from asyncckpt.errors import StorageError
from asyncckpt.stores.buffers import BLOCK_BYTES, BUFFER_BYTES, PooledBuffer
from asyncckpt.stores.contract import FileSink
from asyncckpt.stores.durability import sync_file
from asyncckpt.stores.files import at_least_one

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LARGE_BYTES", "O_DIRECT", "LocalSink"]

LARGE_BYTES = 2**20
"""From here on a file is worth direct I/O, and worth dropping from the page cache."""

O_DIRECT = getattr(os, "O_DIRECT", 0)


class LocalSink(FileSink):
    """See `contract.FileSink`.

    Invariants: while ``_is_direct``, ``_offset`` is a multiple of `BLOCK_BYTES` and everything is
    written from the staging buffer. Bytes received but not yet in the file are the first ``_used``
    of that buffer. The descriptor is open until `close` or `abort`, whichever comes first.

    Args:
        fd: of a new, empty file; the sink owns it from here on. Open with O_DIRECT if *staging* is given.
        path: where the file is.
        key: what to call it in errors.
        staging: aligned buffer for direct I/O; ``None`` writes what comes as it comes.
        is_synced: `close` returns only when the contents are durable.
    """

    __slots__ = ("_error", "_fd", "_is_direct", "_is_synced", "_key", "_offset", "_path", "_staging", "_used")

    def __init__(self, fd: int, path: str, key: str, staging: PooledBuffer | None, *, is_synced: bool) -> None:
        self._fd = fd
        self._path = path
        self._key = key
        self._staging = staging
        self._is_direct = staging is not None
        self._is_synced = is_synced
        self._used = 0
        self._offset = 0
        self._error: StorageError | None = None

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else "direct" if self._is_direct else "buffered"
        return f"LocalSink({self._key!r}, {state}, bytes={self._offset + self._used})"

    @property
    def room_bytes(self) -> int:
        # One byte less than is free: a buffer that is full is written at once.
        return 0 if self._staging is None else BUFFER_BYTES - self._used - 1

    def write(self, buffer: Buffer, /) -> None:
        view = memoryview(buffer)
        if view.nbytes:  # an empty view may have a shape that cannot be cast
            with self._failing():
                self._accept(view.cast("B"))

    def _accept(self, view: memoryview) -> None:
        if self._staging is None:
            self._append(view)
        else:
            self._stage(view, self._staging.view)

    def _stage(self, view: memoryview, staging: memoryview) -> None:
        while view:
            count = min(len(view), BUFFER_BYTES - self._used)
            staging[self._used : self._used + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == BUFFER_BYTES:
                self._append(staging)
                self._used = 0

    def _append(self, view: memoryview) -> None:
        while view:
            try:
                written = os.pwrite(self._fd, view, self._offset)
            except OSError as error:
                # The file system accepted O_DIRECT at open and refuses it now (FUSE, stacked file systems).
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._leave_direct()
                continue
            self._offset += at_least_one(written)
            view = view[written:]
            if self._offset % BLOCK_BYTES:
                self._leave_direct()  # a short write ended inside a block; direct I/O cannot go on from there

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~O_DIRECT)
            self._is_direct = False

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Any failure is final: the file has a hole or an unknown tail, and `close` must not hide that."""
        try:
            if self._error is not None:
                raise self._error
            yield
        except StorageError:
            raise
        except OSError as error:
            self._error = StorageError.from_os_error(error, f"write {self._key}", key=self._key)
            raise self._error from error

    def close(self) -> None:
        if self._fd < 0:
            return
        try:
            with self._failing():
                self._finish()
        except BaseException:
            self.abort()
            raise
        with self._failing():
            self._release()  # close(2) reports errors too, on network file systems

    def _finish(self) -> None:
        cached = not self._is_direct
        if self._staging is not None and self._used:
            whole = self._used - self._used % BLOCK_BYTES
            self._append(self._staging.view[:whole])
            cached = not self._is_direct
            # The last part of a block goes through the page cache: one dirty page, and the file never has
            # another size than its own (padding it and truncating dirties the same page, one call more).
            self._leave_direct()
            self._append(self._staging.view[whole : self._used])
        is_dropped = cached and self._offset >= LARGE_BYTES
        if self._is_synced or is_dropped:
            sync_file(self._fd)
        if is_dropped and hasattr(os, "posix_fadvise"):
            # Only clean pages can be dropped. The page cache belongs to the data loader.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if self._staging is not None:
            self._staging.release()
            self._staging = None
        os.close(fd)

    def abort(self) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self._release()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
