"""Reading a committed step back and comparing it with what its index says. Needs no codec."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import xxhash

from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError, StorageError
from asyncckpt.format.index import FileRecord
from asyncckpt.format.walk import iter_tensors
from asyncckpt.model import Damage, VerifyReport
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.names import HEADER
from asyncckpt.stores.contract import Entry

__all__ = ["Comparison", "name_tensors", "tensor_paths", "verify_step"]

_BLOCK_BYTES = 4 * 2**20
_SPECIAL = "neither a file nor a directory"


class Comparison(Protocol):
    """How a file that is there, and has the right size, is compared with its record. Thread-safe."""

    def compare(self, record: FileRecord) -> int:
        """Read the file.

        Returns:
            How many bytes were read.

        Raises:
            CorruptCheckpointError: it is not what was written.
            StorageError: it cannot be read.
        """

    def conclude(self) -> Iterable[Damage]:
        """What is wrong with the step as a whole; asked for once every file was compared."""


MakeComparison = Callable[[CommittedStep, Mapping[str, FileRecord]], Comparison]


class _Digests:
    """Compares sizes and digests, a block at a time. The `Comparison` that needs no codec."""

    def __init__(self, committed: CommittedStep, records: Mapping[str, FileRecord]) -> None:
        self._committed = committed
        self._local = threading.local()

    def compare(self, record: FileRecord) -> int:
        block = self._block()
        store, key = self._committed.store, f"{self._committed.prefix}/{record.key}"
        digest = xxhash.xxh3_128()
        for offset in range(0, record.bytes, _BLOCK_BYTES):
            wanted = min(_BLOCK_BYTES, record.bytes - offset)
            count = store.read_into(key, block[:wanted], offset, cache=record.bytes < _BLOCK_BYTES)
            digest.update(block[:count])
        if digest.hexdigest() != record.stored:
            raise CorruptCheckpointError("the contents differ from what was written")
        return record.bytes

    def conclude(self) -> Iterable[Damage]:
        return ()

    def _block(self) -> memoryview:
        if not hasattr(self._local, "block"):
            self._local.block = memoryview(bytearray(_BLOCK_BYTES))
        block: memoryview = self._local.block
        return block


def verify_step(
    committed: CommittedStep,
    threads: int = 4,
    *,
    sample: float = 1.0,
    seed: int = 0,
    comparison: MakeComparison = _Digests,
) -> VerifyReport:
    """Check that every file of *committed* is there, has its size and digest, and that nothing else is.

    Takes no lock and disturbs nobody: large files do not stay in the page cache.

    Args:
        committed: the step; it is read anew as far as its header was not read yet.
        threads: how many files are read at once; one block of 4 MiB each.
        sample: fraction of the bytes to read; files are drawn at random until they have it. All files
            are looked for and must have the right size, whatever the fraction.
        seed: of the draw; the same files are drawn for the same step and seed.
        comparison: how files are compared; by digest unless something better is given.

    Returns:
        The report; damage, also of header and index, is in it and not raised.

    Raises:
        InvalidOptionError: *sample* is not above 0 and at most 1.
        CheckpointNotFoundError: there is no such step, or it was deleted meanwhile.
        UnsupportedFormatError: written by a newer version.
        StorageError: the storage cannot be read at all.
    """
    if not 0 < sample <= 1:
        raise InvalidOptionError(f"sample is a fraction above 0 and at most 1, not {sample!r}", sample=repr(sample))
    try:
        _ = committed.info
    except CorruptCheckpointError as error:
        damaged = (_damage(HEADER, error),)
        return VerifyReport(committed.step, num_files=1, checked_bytes=0, damaged=damaged, sample=sample, seed=seed)
    report = _Verification(committed, sample, seed).run(threads, comparison)
    if report.damaged:
        committed.require_unchanged()
    return report


class _Verification:
    """One run over one step."""

    def __init__(self, committed: CommittedStep, sample: float, seed: int) -> None:
        self._committed = committed
        self._sample = sample
        self._seed = seed

    def run(self, threads: int, comparison: MakeComparison) -> VerifyReport:
        expected, own_keys, damaged = self._read_indexes()
        present = dict(self._walk())
        if not damaged:  # without every index nobody knows what is unexpected
            damaged += [
                Damage(key, "unexpected file" if not entry.is_special else _SPECIAL)
                for key, entry in present.items()
                if key not in expected and key not in own_keys
            ]
        whole = [record for record in expected.values() if not self._is_missing(record, present, damaged)]
        chosen = _draw(whole, self._sample, self._seed)
        comparing = comparison(self._committed, expected)
        # Largest first, so that no thread is left alone with a shard at the end.
        chosen.sort(key=lambda record: record.bytes, reverse=True)
        with ThreadPoolExecutor(threads, thread_name_prefix="asyncckpt-verify") as pool:
            results = list(pool.map(lambda record: _compare(comparing, record), chosen))
        damaged += [result for result in results if isinstance(result, Damage)]
        damaged += comparing.conclude()
        paths, malformed = _paths_or_damage(self._committed)
        return VerifyReport(
            self._committed.step,
            num_files=len(expected) + len(own_keys),
            checked_bytes=sum(result for result in results if isinstance(result, int)),
            damaged=name_tensors((*damaged, *malformed), paths),
            deep=comparison is not _Digests,
            sample=self._sample,
            seed=self._seed,
        )

    def _read_indexes(self) -> tuple[dict[str, FileRecord], set[str], list[Damage]]:
        """All records, the keys no record covers (header and index files), and what is wrong with them."""
        records: dict[str, FileRecord] = {}
        damaged: list[Damage] = []
        own_keys = {HEADER}
        for reference in self._committed.header.indexes:
            own_keys |= {f"{reference.key}/zarr.json", f"{reference.key}/c.0"}
            try:
                found = self._committed.read_index_of(reference)
            except CorruptCheckpointError as error:
                damaged.append(_damage(reference.key, error))
                continue
            damaged += [
                Damage(record.key, "it is in the indexes of two ranks") for record in found if record.key in records
            ]
            records.update((record.key, record) for record in found)
        return records, own_keys, damaged

    def _walk(self) -> Iterator[tuple[str, Entry]]:
        """Every file, found through real directories only, keys relative to the step."""
        store, prefix = self._committed.store, self._committed.prefix
        pending = [""]
        while pending:
            above = pending.pop()
            for entry in store.entries(f"{prefix}/{above}".rstrip("/")):
                key = f"{above}{entry.name}"
                if entry.is_directory:
                    pending.append(f"{key}/")
                else:
                    yield key, entry

    def _is_missing(self, record: FileRecord, present: Mapping[str, Entry], damaged: list[Damage]) -> bool:
        entry = present.get(record.key)
        if entry is None:
            damaged.append(Damage(record.key, "the file is missing"))
        elif entry.is_special:
            damaged.append(Damage(record.key, _SPECIAL))
        elif entry.bytes != record.bytes:
            damaged.append(Damage(record.key, f"{entry.bytes} bytes instead of {record.bytes}"))
        else:
            return False
        return True


def _draw(records: Collection[FileRecord], sample: float, seed: int) -> list[FileRecord]:
    """Random files that have the fraction *sample* of all bytes, or a little more."""
    drawn = sorted(records, key=lambda record: record.key)
    if sample >= 1:
        return drawn
    random.Random(seed).shuffle(drawn)
    missing = sample * sum(record.bytes for record in drawn)
    for count, record in enumerate(drawn):
        if missing <= 0:
            return drawn[:count]
        missing -= record.bytes
    return drawn


def _compare(comparing: Comparison, record: FileRecord) -> int | Damage:
    try:
        return comparing.compare(record)
    except (CorruptCheckpointError, StorageError) as error:
        return Damage(record.key, error.message)


def tensor_paths(committed: CommittedStep) -> dict[str, tuple[str, ...]]:
    """Paths in the state of the tensors over each array, by key of the array.

    Raises:
        CorruptCheckpointError: the tree in the header is malformed.
    """
    paths: dict[str, tuple[str, ...]] = {}
    for path, node in iter_tensors(committed.header.tree):
        paths[node["key"]] = (*paths.get(node["key"], ()), path)
    return paths


def _paths_or_damage(committed: CommittedStep) -> tuple[dict[str, tuple[str, ...]], list[Damage]]:
    try:
        return tensor_paths(committed), []
    except CorruptCheckpointError as error:
        return {}, [Damage(HEADER, error.message)]


def name_tensors(damaged: Iterable[Damage], paths: Mapping[str, tuple[str, ...]]) -> tuple[Damage, ...]:
    """*damaged*, sorted, each with the array that its file belongs to and the tensors over that."""
    named = []
    for damage in sorted(damaged, key=lambda damage: damage.key):
        array = damage.array or damage.key.rpartition("/")[0]
        known = damage.array or array in paths
        named.append(replace(damage, array=array, tensors=paths.get(array, ())) if known else damage)
    return tuple(named)


def _damage(key: str, error: CorruptCheckpointError) -> Damage:
    details: Iterable[dict[str, str]] = error.fields.get("damaged", ())
    for detail in details:
        return Damage(detail["key"], detail["reason"])
    return Damage(key, error.message)
