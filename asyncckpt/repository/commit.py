"""Writing one step so that it is either committed and durable, or not there at all.

The order, each line fatal to the save:

1. every file of the step is written below ``.asyncckpt/partial/step-N-<nonce>/``;
2. all of them, and their directories, are made durable;
3. the header ``zarr.json`` is written, fsynced, and then the directory that names it;
4. the directory is renamed to ``step-N``: from here on readers see the step, complete;
5. the root is fsynced: from here on a power cut cannot take it back;
6. the directory the step came from is fsynced, so that it does not come back there.

Why not the header first and one flush for everything: the file system may write in any order, and a
header on disk must mean that everything it promises is on disk.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from asyncckpt.errors import ClosedError, StepExistsError, StorageError, WriterError
from asyncckpt.format.paths import step_name
from asyncckpt.logs import get_logger
from asyncckpt.repository.names import HEADER, PARTIAL, partial_key
from asyncckpt.stores.contract import Barrier, FileSink, Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["StepWriter", "has_size", "sync_renames"]

_logger = get_logger("asyncckpt.repository")
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY)
# The file has too many names, the file system has no links or protects this file, or it was just deleted.
_NOT_LINKABLE = (
    errno.EMLINK, errno.EXDEV, errno.EPERM, errno.ENOENT, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,
)  # fmt: skip


class StepWriter:
    """Writes one step. `begin`, then `put`, `create` and `link` from any thread, then `commit` or `abort`.

    `commit` succeeds only when every `put`, `link` and sink succeeded: the first failure is kept and
    raised again by `commit`, because a file that failed once must not be trusted whatever happens later.

    State: ``_open_sinks``, ``_error`` and ``_is_open`` are guarded by ``_lock``; the rest never changes.
    """

    def __init__(self, store: Store, step: int, prefix: str, barrier: Barrier) -> None:
        self._store = store
        self._step = step
        self._prefix = prefix
        self._barrier = barrier
        self._lock = threading.Lock()
        self._open_sinks: set[_StepSink] = set()
        self._error: StorageError | None = None
        self._is_open = True

    def __repr__(self) -> str:
        state = "open" if self._is_open else "ended"
        return f"StepWriter(step={self._step}, {state}, open_sinks={len(self._open_sinks)})"

    @classmethod
    def begin(cls, store: Store, step: int, nonce: str, attempt: int = 0, *, is_replacing: bool = False) -> StepWriter:
        """Start writing *step*. The caller holds the lock of the root.

        What earlier attempts with the same *nonce*, or an interrupted deletion of the same step, left
        behind is removed.

        Args:
            store: the root.
            step: not yet committed.
            nonce: unique name of this write, of characters that may stand in a file name.
            attempt: counts up when a write that failed is repeated. Each attempt has a directory of its
                own, so that no file is ever written or flushed again after a failed flush.
            is_replacing: the step may be committed; the caller moves it away before `commit`.

        Raises:
            StepExistsError: the step is committed; ``fields["step"]`` names it.
            StorageError: the partial directory cannot be created.
        """
        name = step_name(step)
        if not any(entry.name == HEADER for entry in store.entries(name)):
            store.delete(name)
        elif not is_replacing:
            raise _step_exists(store, step)
        first = partial_key(step, nonce)
        for entry in store.entries(PARTIAL):
            if f"{PARTIAL}/{entry.name}".startswith(first):
                store.delete(f"{PARTIAL}/{entry.name}")
        prefix = f"{first}.{attempt}" if attempt else first
        return cls(store, step, prefix, store.open_barrier(prefix))

    def put(self, key: str, data: Buffer) -> None:
        """Write the whole file *key* (relative to the step).

        Raises:
            StorageError: the write failed; the step can only be aborted.
            ClosedError: the step was committed or aborted.
        """
        self._require_open()
        try:
            self._store.put(f"{self._prefix}/{key}", data)
        except StorageError as error:
            self._note(error)
            raise

    def create(self, key: str, size_hint: int = 0) -> FileSink:
        """Start the file *key* (relative to the step); the sink must be closed before `commit`.

        Raises:
            StorageError: the file cannot be created; the step can only be aborted.
            ClosedError: the step was committed or aborted.
        """
        self._require_open()
        try:
            sink = _StepSink(self, self._store.create(f"{self._prefix}/{key}", size_hint))
        except StorageError as error:
            self._note(error)
            raise
        with self._lock:
            self._open_sinks.add(sink)
        return sink

    def link(self, source: str, key: str) -> bool:
        """Give a file of a committed step the further name *key* (relative to this step).

        Its contents are durable since that step was committed; the new name becomes durable with this step.
        `abort` removes the name, never the file.

        Args:
            source: the file, relative to the root. It must belong to a committed step.
            key: its name in this step.

        Returns:
            Whether that was possible; if not, the file must be written.

        Raises:
            StorageError: the name cannot be created; the step can only be aborted.
            ClosedError: the step was committed or aborted.
        """
        self._require_open()
        try:
            self._store.link(source, f"{self._prefix}/{key}")
        except StorageError as error:
            if error.errno in _NOT_LINKABLE:
                return False
            self._note(error)
            raise
        return True

    def commit(self, header_file: bytes) -> None:
        """Make the step durable and visible; see the module for the order.

        After an error the step is not there, also when only the final flush failed: it could be gone
        after a power cut, must not be acknowledged, and flushing again would prove nothing. Storage so
        broken that it cannot even be removed again leaves it there, complete and unacknowledged.

        Args:
            header_file: contents of the step's ``zarr.json``.

        Raises:
            StepExistsError: somebody else committed this step meanwhile.
            StorageError: the flush, the header or the rename failed, or any write before.
            ClosedError: the step was committed or aborted before.
            WriterError: a file is still being written.
        """
        self._seal()
        store = self._store
        try:
            self._barrier.wait()
            store.put(f"{self._prefix}/{HEADER}", header_file, durable=True)
            store.sync_directory(self._prefix)
            self._rename()
            try:
                sync_renames(store)
            except StorageError:
                self._take_back()
                raise
        finally:
            self._barrier.close()

    def _seal(self) -> None:
        with self._lock:
            self._check_open()
            if self._error is not None:
                raise self._error
            if self._open_sinks:
                raise WriterError(
                    f"step {self._step} cannot be committed: {len(self._open_sinks)} files are not closed",
                    step=self._step,
                )
            self._is_open = False

    def _rename(self) -> None:
        try:
            self._store.rename(self._prefix, step_name(self._step))
        except StorageError as error:
            if error.errno in _OCCUPIED:
                raise _step_exists(self._store, self._step) from error
            raise

    def _take_back(self) -> None:
        # One call that needs nothing to be opened: storage in this state may refuse that. `abort` removes the rest.
        with contextlib.suppress(StorageError):
            self._store.rename(step_name(self._step), self._prefix)

    def abort(self) -> None:
        """Give the step up and remove what was written of it. Never raises; does nothing after a commit.

        What cannot be removed is left for `root.clean_partials`.
        """
        with self._lock:
            self._is_open = False
            sinks = list(self._open_sinks)
        for sink in sinks:
            sink.abort()
        self._barrier.close()
        try:
            self._store.delete(self._prefix)
        except StorageError as error:
            _logger.warning("leaving the unfinished step %s behind: %s", self._prefix, error)

    def _require_open(self) -> None:
        with self._lock:
            self._check_open()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClosedError(f"the write of step {self._step} has ended", step=self._step)

    def _note(self, error: StorageError) -> None:
        with self._lock:
            self._error = self._error or error

    def _forget(self, sink: _StepSink) -> None:
        with self._lock:
            self._open_sinks.discard(sink)


class _StepSink(FileSink):
    """A store's sink that tells its `StepWriter` how it ended."""

    def __init__(self, step: StepWriter, sink: FileSink) -> None:
        self._step = step
        self._sink = sink

    @property
    def room_bytes(self) -> int:
        return self._sink.room_bytes

    def write(self, buffer: Buffer, /) -> None:
        with self._noting():
            self._sink.write(buffer)

    def close(self) -> None:
        try:
            with self._noting():
                self._sink.close()
        finally:
            self._step._forget(self)

    def abort(self) -> None:
        self._sink.abort()
        self._step._forget(self)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self._step._note(error)
            raise


def sync_renames(store: Store) -> None:
    """Make every commit that can be seen durable, also one whose writer was killed right after the rename.

    Raises:
        StorageError: a step may not survive a power cut, although readers see it.
    """
    store.sync_directory("")
    store.sync_directory(PARTIAL)


def has_size(store: Store, key: str, num_bytes: int) -> bool:
    """Whether the regular file *key* is there, with its size, so that it may be linked; it is not read.

    Raises:
        StorageError: nobody can tell.
    """
    directory, _, name = key.rpartition("/")
    # An entry that is not a regular file has size 0, which no file of an array has.
    return any(entry.name == name and entry.bytes == num_bytes for entry in store.entries(directory))


def _step_exists(store: Store, step: int) -> StepExistsError:
    return StepExistsError(
        f"step {step} is already committed at {store.location(step_name(step))}; delete it first", step=step
    )
