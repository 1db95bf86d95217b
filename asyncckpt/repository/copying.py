"""Copying one committed step to another root: whole, durable and checked, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import xxhash

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, StorageError
from asyncckpt.format.header import MAX_HEADER_BYTES, Header, decode_header_file
from asyncckpt.format.index import FileRecord, decode_index
from asyncckpt.format.limits import MAX_METADATA_BYTES
from asyncckpt.format.paths import step_name
from asyncckpt.repository.catalog import ABSENT, UNREADABLE, CommittedStep
from asyncckpt.repository.commit import StepWriter, has_size, sync_renames
from asyncckpt.repository.names import HEADER
from asyncckpt.repository.quarantine import move_aside
from asyncckpt.stores.contract import Store

__all__ = ["CopyStats", "copy_step"]

_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class CopyStats:
    """What one copy took.

    Attributes:
        copied_bytes: read, compared and written.
        linked_bytes: not copied, but shared with the step named by ``link_to``.
    """

    copied_bytes: int = 0
    linked_bytes: int = 0


def copy_step(
    source: CommittedStep,
    target: Store,
    pace: Callable[[], None],
    *,
    attempt: int = 0,
    link_to: CommittedStep | None = None,
) -> CopyStats:
    """Commit a copy of *source* in *target*, by the same protocol as any step, under the same nonce.

    Every byte is compared with the digests in the header and the index before the copy is committed. A step
    with the same number and another nonce is moved to ``.asyncckpt/damaged`` once the copy is whole. The
    caller holds the lock of *target*.

    Args:
        source: the step.
        target: the other root.
        pace: called between blocks of at most 4 MiB; it may wait, or raise to give the copy up.
        attempt: counts up when a copy that failed is repeated.
        link_to: a step of *target* whose files are linked where they are the same, if it can do that.

    Raises:
        CheckpointNotFoundError: *source* was deleted meanwhile.
        CorruptCheckpointError: *source* is damaged; nothing was committed.
        UnsupportedFormatError: *source* was written by a newer version.
        StorageError: *target* cannot be written, or *source* not be read.
        BaseException: what *pace* raises.
    """
    _ = source.header  # raises what is wrong with it
    header_file = source.read_file(HEADER, MAX_HEADER_BYTES)
    header = decode_header_file(header_file)
    if _is_there(target, header):
        sync_renames(target)  # whoever committed it may have been killed before this
        return CopyStats()
    writer = StepWriter.begin(target, header.step, header.nonce, attempt, is_replacing=True)
    try:
        stats = _Copy(source, writer, target, pace, link_to).run(header)
        _commit(target, writer, header.step, header_file)
    except BaseException:
        writer.abort()
        raise
    return stats


def _is_there(target: Store, header: Header) -> bool:
    try:
        return CommittedStep(target, header.step).header.nonce == header.nonce
    except CheckpointError:
        return False


def _commit(target: Store, writer: StepWriter, step: int, header_file: bytes) -> None:
    """Commit, in the place of whatever has that number."""
    name = step_name(step)
    is_taken = any(entry.name == HEADER for entry in target.entries(name))
    aside = move_aside(target, step) if is_taken else None
    try:
        writer.commit(header_file)
    except BaseException:
        if aside is not None:
            with contextlib.suppress(StorageError):
                target.rename(aside, name)
        raise


class _Copy:
    """The files of one step on their way."""

    def __init__(
        self,
        source: CommittedStep,
        writer: StepWriter,
        target: Store,
        pace: Callable[[], None],
        link_to: CommittedStep | None,
    ) -> None:
        self._source = source
        self._writer = writer
        self._target = target
        self._pace = pace
        self._link_to = link_to
        self._known = _records(link_to) if target.properties.hard_links else {}
        self._block = memoryview(bytearray(_BLOCK_BYTES))

    def run(self, header: Header) -> CopyStats:
        copied_bytes = linked_bytes = 0
        for reference in header.indexes:
            metadata = self._source.read_file(f"{reference.key}/zarr.json", MAX_METADATA_BYTES)
            chunk = self._source.read_file(f"{reference.key}/c.0", reference.bytes + 1)
            for record in decode_index(reference, metadata, chunk):
                self._pace()
                if self._link(record):
                    linked_bytes += record.bytes
                else:
                    self._copy(record)
                    copied_bytes += record.bytes
            self._writer.put(f"{reference.key}/zarr.json", metadata)
            self._writer.put(f"{reference.key}/c.0", chunk)
            copied_bytes += len(metadata) + len(chunk)
        return CopyStats(copied_bytes, linked_bytes)

    def _link(self, record: FileRecord) -> bool:
        # As in a save: metadata files are cheaper written than looked at, and the size catches what a file system
        # check leaves of a file.
        if self._link_to is None or self._known.get(record.key) != record or record.key.endswith("/zarr.json"):
            return False
        key = f"{self._link_to.prefix}/{record.key}"
        return has_size(self._target, key, record.bytes) and self._writer.link(key, record.key)

    def _copy(self, record: FileRecord) -> None:
        if record.bytes <= _BLOCK_BYTES:
            digest = xxhash.xxh3_128()
            data = self._read(record, 0, digest)
            self._require(record, digest)
            self._writer.put(record.key, data)
            return
        with self._writer.create(record.key, record.bytes) as sink:
            digest = xxhash.xxh3_128()
            for offset in range(0, record.bytes, _BLOCK_BYTES):
                sink.write(self._read(record, offset, digest))
                self._pace()
            self._require(record, digest)

    def _read(self, record: FileRecord, offset: int, digest: xxhash.xxh3_128) -> memoryview:
        wanted = self._block[: min(_BLOCK_BYTES, record.bytes - offset)]
        store, key = self._source.store, f"{self._source.prefix}/{record.key}"
        try:
            count = store.read_into(key, wanted, offset, cache=record.bytes < _BLOCK_BYTES)
        except StorageError as error:
            if error.errno not in UNREADABLE | ABSENT:
                raise
            raise self._damaged(record, error.message) from error
        digest.update(wanted[:count])
        return wanted[:count]

    def _require(self, record: FileRecord, digest: xxhash.xxh3_128) -> None:
        if digest.hexdigest() != record.stored:
            raise self._damaged(record, "the contents differ from what was written")

    def _damaged(self, record: FileRecord, reason: str) -> CorruptCheckpointError:
        self._source.require_unchanged()  # what is missing in a deleted step is no damage
        return CorruptCheckpointError(
            f"step {self._source.step} at {self._source.location} is damaged: {record.key}: {reason}",
            step=self._source.step,
            key=record.key,
            damaged=[{"key": record.key, "reason": reason}],
        )


def _records(step: CommittedStep | None) -> Mapping[str, FileRecord]:
    """The files of *step* by key; none when it cannot be read, which is no reason not to copy."""
    try:
        return {} if step is None else {record.key: record for record in step.read_index()}
    except CheckpointError:
        return {}
