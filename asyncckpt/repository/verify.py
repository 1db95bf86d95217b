"""Reading a whole committed step back and comparing it with what its index says. Needs no codec."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import xxhash

from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format.index import FileRecord
from asyncckpt.model import Damage, VerifyReport
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.names import HEADER
from asyncckpt.stores.contract import Entry

__all__ = ["verify_step"]

_BLOCK_BYTES = 4 * 2**20
_SPECIAL = "neither a file nor a directory"


def verify_step(committed: CommittedStep, threads: int = 4) -> VerifyReport:
    """Check that every file of *committed* is there, has its size and digest, and that nothing else is.

    Takes no lock and disturbs nobody: large files do not stay in the page cache.

    Args:
        committed: the step; it is read anew as far as its header was not read yet.
        threads: how many files are read at once; one block of 4 MiB each.

    Returns:
        The report; damage, also of header and index, is in it and not raised.

    Raises:
        CheckpointNotFoundError: there is no such step, or it was deleted meanwhile.
        UnsupportedFormatError: written by a newer version.
        StorageError: the storage cannot be read at all.
    """
    try:
        _ = committed.info
    except CorruptCheckpointError as error:
        return VerifyReport(committed.step, num_files=1, checked_bytes=0, damaged=(_damage(HEADER, error),))
    report = _Verification(committed).run(threads)
    if report.damaged:
        committed.require_unchanged()
    return report


class _Verification:
    """One run over one step. ``_checked_bytes`` is guarded by ``_lock``."""

    def __init__(self, committed: CommittedStep) -> None:
        self._committed = committed
        self._local = threading.local()
        self._lock = threading.Lock()
        self._checked_bytes = 0

    def run(self, threads: int) -> VerifyReport:
        records, own_keys, damaged = self._read_indexes()
        present = dict(self._walk(""))
        expected = {record.key: record for record in records}
        if not damaged:  # without every index nobody knows what is unexpected
            damaged += [
                Damage(key, "unexpected file" if not entry.is_special else _SPECIAL)
                for key, entry in present.items()
                if key not in expected and key not in own_keys
            ]
        # Largest first, so that no thread is left alone with a shard at the end.
        by_size = sorted(expected.values(), key=lambda record: record.bytes, reverse=True)
        with ThreadPoolExecutor(threads, thread_name_prefix="asyncckpt-verify") as pool:
            found = pool.map(lambda record: self._check(record, present.get(record.key)), by_size)
            damaged += [damage for damage in found if damage is not None]
        return VerifyReport(
            self._committed.step,
            num_files=len(expected) + len(own_keys),
            checked_bytes=self._checked_bytes,
            damaged=tuple(sorted(damaged, key=lambda damage: damage.key)),
        )

    def _read_indexes(self) -> tuple[list[FileRecord], set[str], list[Damage]]:
        """All records, the keys no record covers (header and index files), and what is wrong with them."""
        records: list[FileRecord] = []
        damaged: list[Damage] = []
        own_keys = {HEADER}
        for reference in self._committed.header.indexes:
            own_keys |= {f"{reference.key}/zarr.json", f"{reference.key}/c.0"}
            try:
                records += self._committed.read_index_of(reference)
            except CorruptCheckpointError as error:
                damaged.append(_damage(reference.key, error))
        return records, own_keys, damaged

    def _walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """Every file below *prefix*, found through real directories only, keys relative to the step."""
        committed = self._committed
        for entry in committed.store.entries(f"{committed.prefix}/{prefix}".rstrip("/")):
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_directory:
                yield from self._walk(key)
            else:
                yield key, entry

    def _check(self, record: FileRecord, entry: Entry | None) -> Damage | None:
        if entry is None:
            return Damage(record.key, "the file is missing")
        if entry.is_special:
            return Damage(record.key, _SPECIAL)
        if entry.bytes != record.bytes:
            return Damage(record.key, f"{entry.bytes} bytes instead of {record.bytes}")
        try:
            digest = self._digest(record)
        except StorageError as error:
            return Damage(record.key, error.message)
        return None if digest == record.stored else Damage(record.key, "the contents differ from what was written")

    def _digest(self, record: FileRecord) -> str:
        block = self._block()
        store, key = self._committed.store, f"{self._committed.prefix}/{record.key}"
        digest = xxhash.xxh3_128()
        for offset in range(0, record.bytes, _BLOCK_BYTES):
            wanted = min(_BLOCK_BYTES, record.bytes - offset)
            count = store.read_into(key, block[:wanted], offset, cache=record.bytes < _BLOCK_BYTES)
            digest.update(block[:count])
            with self._lock:
                self._checked_bytes += count
        return digest.hexdigest()

    def _block(self) -> memoryview:
        if not hasattr(self._local, "block"):
            self._local.block = memoryview(bytearray(_BLOCK_BYTES))
        block: memoryview = self._local.block
        return block


def _damage(key: str, error: CorruptCheckpointError) -> Damage:
    details: Iterable[dict[str, str]] = error.fields.get("damaged", ())
    for detail in details:
        return Damage(detail["key"], detail["reason"])
    return Damage(key, error.message)
