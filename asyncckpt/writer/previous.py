"""What the previous step holds: a file that did not change since is linked, not encoded and written again.

Why a link is as safe as a file of its own, and what it cannot protect from, is argued in
``docs/decisions/014-incremental.md``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import xxhash

from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError
from asyncckpt.format.index import FileRecord
from asyncckpt.format.paths import step_name
from asyncckpt.logs import get_logger
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.repository.commit import StepWriter, has_size
from asyncckpt.stores.contract import Store

__all__ = ["PreviousStep"]

_BEGINNING_BYTES = 64 * 2**10
_logger = get_logger("asyncckpt.writer")


@dataclass(frozen=True, slots=True)
class _Source:
    """A committed step, and its files by key."""

    step: int
    nonce: str
    files: Mapping[str, FileRecord]

    def find(self, key: str, raw: str, metadata: bytes) -> FileRecord | None:
        """The chunk or shard file *key*, if it holds the bytes of digest *raw* in the layout of *metadata*."""
        record = self.files.get(key)
        if record is None or record.raw != raw:
            return None
        array, _, _ = key.rpartition("/")
        stored_metadata = self.files.get(f"{array}/zarr.json")
        if stored_metadata is None or stored_metadata.stored != xxhash.xxh3_128_hexdigest(metadata):
            return None
        return record


class PreviousStep:
    """Links unchanged files of the step being written to those of the newest committed one.

    One save at a time: `begin`, then `may_hold` and `link` from any thread, then `remember` if the save was committed.

    State: ``_source``, ``_beginnings`` and ``_is_checked`` are guarded by ``_lock`` while a save runs;
    ``_new_beginnings`` gets one entry per file, each from one thread.

    Args:
        store: the root.
        incremental: whether to link at all.
    """

    def __init__(self, store: Store, *, incremental: bool) -> None:
        self._store = store
        self._is_enabled = incremental and store.properties.hard_links
        self._lock = threading.Lock()
        self._source: _Source | None = None
        # Of the files of the source; None when it was read from storage, which does not tell.
        self._beginnings: Mapping[str, str] | None = None
        self._new_beginnings: dict[str, str] = {}
        self._is_checked = False

    def __repr__(self) -> str:
        source = "nothing" if self._source is None else f"step {self._source.step}"
        return f"PreviousStep({source}, enabled={self._is_enabled})"

    def begin(self) -> None:
        """A save begins. The first one of this process looks for what an earlier one committed. Never raises."""
        self._is_checked = False
        self._new_beginnings = {}
        if self._is_enabled and self._source is None:
            self._source = self._read_newest()
            self._is_checked = True

    def may_hold(self, key: str, raw: memoryview) -> bool:
        """Whether the previous step may hold *raw* as its chunk or shard file *key*.

        Training changes nearly every file, and a changed one shows it in its beginning. So the digest of all of
        it, which `link` wants, is worth a pass over the memory only when the beginning is the same.
        """
        if not self._is_enabled:
            return False
        beginning = self._new_beginnings[key] = xxhash.xxh3_128_hexdigest(raw[:_BEGINNING_BYTES])
        # Without the lock, which may be held while the storage is asked: a pair that does not belong together only
        # makes a worse guess, and `link` compares all that counts.
        source, beginnings = self._source, self._beginnings
        if source is None or key not in source.files:
            return False
        return beginnings is None or beginnings.get(key) == beginning

    def link(self, step: StepWriter, key: str, raw: str, metadata: bytes) -> FileRecord | None:
        """Link the chunk or shard file *key* into *step*, if the previous step has the same.

        Args:
            step: being written.
            key: of the file, relative to the step.
            raw: digest of the raw bytes that it is to hold.
            metadata: ``zarr.json`` of its array: shape, data type, chunks and codecs must be the same.

        Returns:
            The record of the linked file; None when it must be written.

        Raises:
            StorageError: the save is lost.
        """
        source = self._source
        if source is None or source.find(key, raw, metadata) is None:
            return None
        source = self._current_source()
        record = None if source is None else source.find(key, raw, metadata)
        if source is None or record is None:
            return None
        source_key = f"{step_name(source.step)}/{key}"
        return record if self._has_size(source_key, record.bytes) and step.link(source_key, key) else None

    def remember(self, step: int, nonce: str, records: Iterable[FileRecord]) -> None:
        """*step* is committed and durable; the next save links to it."""
        if self._is_enabled:
            self._source = _Source(step, nonce, {record.key: record for record in records})
            self._beginnings = self._new_beginnings

    def _current_source(self) -> _Source | None:
        """The source, after making sure, once per save, that it was not deleted or set aside meanwhile."""
        with self._lock:
            if not self._is_checked:
                self._is_checked = True
                if self._source is not None and not self._is_committed(self._source):
                    self._source = self._read_newest()
                    self._beginnings = None
            return self._source

    def _is_committed(self, source: _Source) -> bool:
        # The nonce, because the number may have been deleted and saved again.
        try:
            return CommittedStep(self._store, source.step).header.nonce == source.nonce
        except CheckpointError:
            return False

    def _read_newest(self) -> _Source | None:
        try:
            newest = Catalog(self._store).find("latest")
            return _Source(newest.step, newest.header.nonce, {record.key: record for record in newest.read_index()})
        except CheckpointNotFoundError:
            return None
        except CheckpointError as error:
            # Whatever is wrong with it, it is no reason not to save: everything is written then.
            _logger.debug("not linking to the newest step: %s", error)
            return None

    def _has_size(self, key: str, num_bytes: int) -> bool:
        try:
            return has_size(self._store, key, num_bytes)
        except StorageError:
            return False
