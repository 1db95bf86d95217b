"""Reads tensors of a committed step: every byte verified, or nothing returned."""

from __future__ import annotations

import base64
import binascii
import errno
import functools
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.files import decode_file
from asyncckpt.format.header import InlineTensor
from asyncckpt.format.index import FileRecord
from asyncckpt.format.layout import ArrayLayout, FilePart
from asyncckpt.format.metadata import decode_array_metadata
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.restore.scratch import FreshMemory, Memory

__all__ = ["read_tensors"]


@dataclass(frozen=True, slots=True)
class _Array:
    """One array to read: where its bytes go, and what they are."""

    key: str
    layout: ArrayLayout
    torch_dtype: str | None


@dataclass(frozen=True, slots=True)
class _File:
    """One chunk or shard file, and the memory of its whole array."""

    array: _Array
    part: FilePart
    record: FileRecord
    out: memoryview


class _Buffers(threading.local):
    """One reused read buffer per thread: fresh memory for every chunk costs more than decoding it."""

    def __init__(self) -> None:
        self._block = bytearray()

    def get(self, num_bytes: int) -> memoryview:
        if len(self._block) < num_bytes:
            self._block = bytearray(num_bytes)
        return memoryview(self._block)[:num_bytes]


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
        threads: decoding threads; None takes the CPUs this process may use.
        memory: where the tensors lie; None gives them fresh memory of their own.

    Returns:
        One CPU tensor per key. A type that Zarr lacks comes as its bytes.

    Raises:
        CorruptCheckpointError: something is damaged; ``fields["damaged"]`` lists every file.
        CheckpointNotFoundError: the step was deleted meanwhile.
        StorageError: the storage failed.
        StagingMemoryError: there is not enough memory.
    """
    inline = committed.header.inline
    tensors = {key: _inline_tensor(key, inline[key]) for key in keys if key in inline}
    wanted = [key for key in keys if key not in inline]
    if not wanted:
        return tensors
    reader = _Reader(committed)
    with ThreadPoolExecutor(threads or _available_cpus(), thread_name_prefix="asyncckpt-restore") as pool:
        arrays = [array for array in pool.map(reader.read_layout, wanted) if array is not None]
        reader.raise_damage()
        blocks = (memory or FreshMemory()).allocate([array.layout.num_bytes for array in arrays])
        files = [file for array, out in zip(arrays, blocks, strict=True) for file in reader.files(array, out)]
        reader.raise_damage()
        # Largest first, so that no thread starts a long file when the others are done.
        files.sort(key=lambda file: file.part.start - file.part.stop)
        for _ in pool.map(reader.read_file, files):
            pass
    reader.raise_damage()
    tensors.update((array.key, _tensor(array, out)) for array, out in zip(arrays, blocks, strict=True))
    return tensors


class _Reader:
    """Shared by the threads of one call; collects what is damaged instead of stopping at the first."""

    def __init__(self, committed: CommittedStep) -> None:
        self._committed = committed
        self._records = {record.key: record for record in committed.read_index()}
        self._buffers = _Buffers()
        self._damaged: list[dict[str, str]] = []

    def raise_damage(self) -> None:
        """Raise if anything was damaged; unless the step was deleted, which explains it."""
        if not self._damaged:
            return
        self._committed.require_unchanged()
        first = self._damaged[0]
        rest = f" and {len(self._damaged) - 1} more files" if len(self._damaged) > 1 else ""
        raise CorruptCheckpointError(
            f"step {self._committed.step} is damaged: {first['key']}: {first['reason']}{rest}",
            step=self._committed.step,
            path=self._committed.location,
            damaged=sorted(self._damaged, key=lambda damage: damage["key"]),
        )

    def read_layout(self, key: str) -> _Array | None:
        name = f"{key}/zarr.json"
        found: _Array | None = self._guarded(name, lambda: self._read_layout(key, name))
        return found

    def _read_layout(self, key: str, name: str) -> _Array:
        data = self._committed.read_file(name)
        _check_digest(self._record(name), len(data), xxhash.xxh3_128_hexdigest(data))
        layout, attributes = decode_array_metadata(data)
        if layout.num_bytes > self._committed.header.raw_bytes:
            raise CorruptCheckpointError(f"it announces {layout.num_bytes} bytes, more than the whole checkpoint")
        return _Array(key, layout, attributes.get("asyncckpt", {}).get("torch_dtype"))

    def files(self, array: _Array, out: memoryview) -> Iterable[_File]:
        for part in array.layout.files():
            name = f"{array.key}/{part.key}"
            record = self._guarded(name, functools.partial(self._record, name))
            if record is not None:
                yield _File(array, part, record, out)

    def read_file(self, file: _File) -> None:
        self._guarded(file.record.key, lambda: self._read_file(file))

    def _read_file(self, file: _File) -> None:
        record = file.record
        # One byte more than there should be, so that a file that grew is noticed.
        room = self._buffers.get(record.bytes + 1)
        num_bytes = self._committed.store.read_into(f"{self._committed.prefix}/{record.key}", room)
        data = room[: record.bytes]
        _check_digest(record, num_bytes, xxhash.xxh3_128_hexdigest(data))
        decode_file(file.array.layout, file.part, data, file.out)

    def _record(self, name: str) -> FileRecord:
        try:
            return self._records[name]
        except KeyError:
            raise CorruptCheckpointError("it is not in the index") from None

    def _guarded(self, name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CorruptCheckpointError as error:
            self._damaged.append({"key": name, "reason": error.message})
        except StorageError as error:
            if error.errno is None or error.errno not in _DAMAGE_ERRNOS:
                raise
            self._damaged.append({"key": name, "reason": error.message})
        return None


# What a missing file, a failing medium or a tampered step gives; anything else says nothing about the step.
_DAMAGE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.EINVAL, errno.ELOOP)


def _check_digest(record: FileRecord, num_bytes: int, digest: str) -> None:
    if num_bytes != record.bytes:
        raise CorruptCheckpointError(f"it has {num_bytes} bytes instead of {record.bytes}")
    if digest != record.stored:
        raise CorruptCheckpointError("it does not match its digest")


def _inline_tensor(key: str, inline: InlineTensor) -> torch.Tensor:
    try:
        data = bytearray(base64.b64decode(inline.data, validate=True))
    except binascii.Error as error:
        raise CorruptCheckpointError(f"inline tensor {key} is malformed", key=key) from error
    if inline.dtype not in DATA_TYPES or min(inline.shape, default=0) < 0:
        raise CorruptCheckpointError(f"inline tensor {key} has an unknown type or shape", key=key)
    if len(data) != math.prod(inline.shape) * DATA_TYPES[inline.dtype].itemsize:
        raise CorruptCheckpointError(f"inline tensor {key} has the wrong size", key=key)
    return _view(memoryview(data), inline.dtype, tuple(inline.shape))


def _tensor(array: _Array, data: memoryview) -> torch.Tensor:
    return _view(data, array.layout.data_type.name, array.layout.shape)


def _view(data: memoryview, data_type: str, shape: tuple[int, ...]) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, data_type)
    if len(data) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
