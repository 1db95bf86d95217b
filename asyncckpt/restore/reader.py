"""Reads tensors of a committed step: every byte verified, or nothing returned."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import xxhash

from asyncckpt.errors import CorruptCheckpointError, StagingMemoryError, StorageError
from asyncckpt.format.files import decode_file
from asyncckpt.format.header import InlineTensor
from asyncckpt.format.index import FileRecord
from asyncckpt.format.layout import ArrayLayout, FilePart
from asyncckpt.format.limits import MAX_METADATA_BYTES
from asyncckpt.format.metadata import decode_array_metadata
from asyncckpt.interpreter import Lane, collector_paused
from asyncckpt.model import Damage
from asyncckpt.processes import available_cpus
from asyncckpt.repository.catalog import ABSENT, UNREADABLE, CommittedStep
from asyncckpt.repository.names import HEADER
from asyncckpt.restore.buffers import ThreadBuffers
from asyncckpt.restore.scratch import FreshMemory, Memory
from asyncckpt.restore.shards import STREAMED_BYTES, decode_shard
from asyncckpt.restore.tensors import inline_tensor, tensor_over
from asyncckpt.stores.contract import Store

__all__ = ["TensorReader", "read_tensors"]

_SMALL_BYTES = 64 * 2**10
_BATCH = 32
_T = TypeVar("_T")


def read_tensors(
    committed: CommittedStep,
    keys: Collection[str],
    *,
    threads: int | None = None,
    memory: Memory | None = None,
) -> dict[str, torch.Tensor]:
    """Read and verify the arrays *keys*.

    Args:
        committed: the step.
        keys: array keys, ``state/model/lm_head.weight``; inline tensors count as arrays.
        threads: decoding threads; None takes one more than the CPUs this process may use.
        memory: where the tensors lie; None gives them fresh memory of their own.

    Returns:
        One CPU tensor per key. A type that Zarr lacks comes as its bytes.

    Raises:
        CorruptCheckpointError: something is damaged; ``fields["damaged"]`` lists every file.
        CheckpointNotFoundError: the step was deleted meanwhile.
        StorageError: the storage failed.
        StagingMemoryError: there is not enough memory.
    """
    reader = TensorReader(committed.store, committed.prefix, committed.header.raw_bytes)
    with collector_paused():
        tensors = reader.read_inline(committed.header.inline, keys)
        wanted = [key for key in dict.fromkeys(keys) if key not in committed.header.inline]
        if wanted:
            reader.expect(committed.read_index())
            tensors.update(reader.read(wanted, threads, memory, or_nothing=True))
    if reader.damaged:
        committed.require_unchanged()
        raise _corrupt(committed, reader.damaged)
    return tensors


def _corrupt(committed: CommittedStep, damaged: Collection[Damage]) -> CorruptCheckpointError:
    first, *rest = sorted(damaged, key=lambda damage: damage.key)
    more = f" and {len(rest)} more files" if rest else ""
    return CorruptCheckpointError(
        f"step {committed.step} is damaged: {first.key}: {first.reason}{more}",
        step=committed.step,
        path=committed.location,
        damaged=[{"key": damage.key, "reason": damage.reason} for damage in (first, *rest)],
    )


@dataclass(frozen=True, slots=True)
class _Array:
    """One array to read."""

    key: str
    layout: ArrayLayout


@dataclass(frozen=True, slots=True)
class _File:
    """One chunk or shard file, what should be in it, and the memory of its whole array."""

    array: _Array
    name: str
    part: FilePart
    record: FileRecord | None
    out: memoryview


class TensorReader:
    """Reads arrays of one step; collects what is damaged instead of stopping at the first.

    Until `expect` is called, nothing vouches for a file but the checksums in it.

    Args:
        store: the root.
        prefix: the step.
        max_bytes: what all arrays may have together; more is a lie.

    Attributes:
        damaged: what is damaged, in no order.
    """

    def __init__(self, store: Store, prefix: str, max_bytes: int | None = None) -> None:
        self._store = store
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._records: Mapping[str, FileRecord] | None = None
        self._buffers = ThreadBuffers()
        self._lane = Lane()
        self.damaged: list[Damage] = []

    def expect(self, records: Collection[FileRecord]) -> None:
        """From now on a file must be what its record says, and must have one."""
        self._records = {record.key: record for record in records}

    def read_inline(self, inline: Mapping[str, InlineTensor], keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Those of *keys* that are in the header."""
        wanted = [key for key in dict.fromkeys(keys) if key in inline]
        found = {key: self._guarded(HEADER, key, functools.partial(inline_tensor, inline[key])) for key in wanted}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def read(
        self,
        keys: Collection[str],
        threads: int | None = None,
        memory: Memory | None = None,
        *,
        or_nothing: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The arrays *keys*, without those that are damaged.

        Args:
            keys: array keys.
            threads: decoding threads; None takes one more than the CPUs this process may use.
            memory: where the tensors lie; None gives them fresh memory of their own.
            or_nothing: whether to stop early when something is damaged.

        Raises:
            StorageError: the storage failed.
            StagingMemoryError: there is not enough memory.
        """
        # One more than there are CPUs: it decodes while another waits for the disk. Further ones make no cold restore
        # quicker, since the kernel reads ahead, and a warm one slower.
        with ThreadPoolExecutor(threads or available_cpus() + 1, thread_name_prefix="asyncckpt-restore") as pool:
            arrays = self._find_arrays(keys, lambda some: pool.map(self._read_arrays, _batches(some)))
            self._check_total(arrays)
            if or_nothing and self.damaged:
                return {}
            blocks = (memory or FreshMemory()).allocate([array.layout.num_bytes for array in arrays])
            files = [file for array, out in zip(arrays, blocks, strict=True) for file in self._files(array, out)]
            # Largest first, so that no thread starts a long file when the others are done.
            files.sort(key=lambda file: file.part.start - file.part.stop)
            num_large = sum(file.part.stop - file.part.start > _SMALL_BYTES for file in files)
            for _ in itertools.chain(
                pool.map(self._read_file, files[:num_large]), pool.map(self._read_small, _batches(files[num_large:]))
            ):
                pass
        lost = {damage.array for damage in self.damaged}
        pairs = zip(arrays, blocks, strict=True)
        views = {
            array.key: self._guarded(
                f"{array.key}/zarr.json", array.key, functools.partial(tensor_over, array.layout, out)
            )
            for array, out in pairs
            if array.key not in lost
        }
        return {key: tensor for key, tensor in views.items() if tensor is not None}

    def _check_total(self, arrays: Collection[_Array]) -> None:
        total = sum(array.layout.num_bytes for array in arrays)
        if self._max_bytes is not None and total > self._max_bytes:
            reason = f"its arrays announce {total} bytes, more than the whole checkpoint with {self._max_bytes}"
            self.damaged.append(Damage(HEADER, reason))

    def _find_arrays(
        self, keys: Collection[str], read: Callable[[Sequence[str]], Iterable[list[_Array | None]]]
    ) -> list[_Array]:
        """What ``zarr.json`` says of each array, without those where it is damaged.

        The index tells which of these files are the same, and most are: only the one whose array comes first in the
        alphabet is read, and any other only if that one is damaged.
        """
        alike: dict[Any, list[str]] = {}
        for key in keys:
            record = None if self._records is None else self._records.get(f"{key}/zarr.json")
            alike.setdefault(key if record is None else (record.stored, record.bytes), []).append(key)
        firsts = [min(same) for same in alike.values()]
        found = {array.key: array for batch in read(firsts) for array in batch if array is not None}
        others: list[str] = []
        for first, same in zip(firsts, alike.values(), strict=True):
            if first in found:
                found |= {key: _Array(key, found[first].layout) for key in same}
            else:
                others += [key for key in same if key != first]
        found |= {array.key: array for batch in read(others) for array in batch if array is not None}
        return [found[key] for key in keys if key in found]

    def _read_arrays(self, keys: Sequence[str]) -> list[_Array | None]:
        with self._lane.batch(len(keys)):
            return [self._array(key) for key in keys]

    def _array(self, key: str) -> _Array | None:
        name = f"{key}/zarr.json"
        found: _Array | None = self._guarded(name, key, lambda: self._read_metadata(key, name))
        return found

    def _read_metadata(self, key: str, name: str) -> _Array:
        data = self._store.read(f"{self._prefix}/{name}", 0, MAX_METADATA_BYTES + 1)
        _check_digest(self._record(name), len(data), data)
        layout, _ = decode_array_metadata(data)
        if self._records is None and {"name": "crc32c"} not in layout.codecs:
            raise CorruptCheckpointError("nothing vouches for it: neither an index nor a crc32c in its codecs")
        # Files are counted before anybody enumerates them, and before their array gets memory.
        if self._records is None:
            present = {entry.name for entry in self._store.entries(f"{self._prefix}/{key}") if not entry.is_special}
            is_there = layout.num_files < len(present) and all(part.key in present for part in layout.files())
        else:
            is_there = layout.num_files < len(self._records)
        if not is_there:
            raise CorruptCheckpointError(f"some of the {layout.num_files} files of this array are missing")
        return _Array(key, layout)

    def _files(self, array: _Array, out: memoryview) -> Iterator[_File]:
        for part in array.layout.files():
            name = f"{array.key}/{part.key}"
            file = self._guarded(name, array.key, functools.partial(self._file, array, name, part, out))
            if file is not None:
                yield file

    def _file(self, array: _Array, name: str, part: FilePart, out: memoryview) -> _File:
        record = self._record(name)
        if record is not None and record.bytes > array.layout.max_stored_bytes:
            raise CorruptCheckpointError(f"it cannot have {record.bytes} bytes")
        return _File(array, name, part, record, out)

    def _read_small(self, files: Sequence[_File]) -> None:
        with self._lane.batch(len(files)):
            for file in files:
                self._read_file(file)

    def _read_file(self, file: _File) -> None:
        self._guarded(file.name, file.array.key, functools.partial(self._decode_file, file))

    def _decode_file(self, file: _File) -> None:
        layout, record = file.array.layout, file.record
        if record is not None and layout.shard_shape is not None and record.bytes > STREAMED_BYTES:
            key = f"{self._prefix}/{file.name}"
            try:
                decode_shard(
                    functools.partial(self._store.read_into, key), layout, file.part, record, file.out, self._buffers
                )
                return
            except CorruptCheckpointError:
                pass  # the whole file at once tells what is wrong with it
        # One byte more than there should be, so that a file that grew is noticed.
        room = self._buffers.get((layout.max_stored_bytes if record is None else record.bytes) + 1)
        num_bytes = self._store.read_into(f"{self._prefix}/{file.name}", room)
        data = room[: min(num_bytes, len(room) - 1)]
        _check_digest(record, num_bytes, data)
        decode_file(layout, file.part, data, file.out)

    def _record(self, name: str) -> FileRecord | None:
        if self._records is None:
            return None
        try:
            return self._records[name]
        except KeyError:
            raise CorruptCheckpointError("it is not in the index") from None

    def _guarded(self, name: str, array: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CorruptCheckpointError as error:
            self.damaged.append(Damage(name, error.message, array))
        except StorageError as error:
            if error.errno not in UNREADABLE | ABSENT:
                raise
            self.damaged.append(Damage(name, error.message, array))
        except MemoryError as error:
            raise StagingMemoryError(f"there is no memory to decode {name}") from error
        return None


def _batches(items: Sequence[_T]) -> list[Sequence[_T]]:
    """Small things for a thread to do in a row: handing over each one would take longer than doing it."""
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]


def _check_digest(record: FileRecord | None, num_bytes: int, data: bytes | memoryview) -> None:
    if record is None:
        return
    if num_bytes != record.bytes:
        raise CorruptCheckpointError(f"it has {num_bytes} bytes instead of {record.bytes}")
    if xxhash.xxh3_128_hexdigest(data) != record.stored:
        raise CorruptCheckpointError("it does not match its digest")
