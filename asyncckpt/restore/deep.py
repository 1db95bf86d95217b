"""Verifying by decoding: what a restore would do, with one chunk in memory instead of every tensor.

Digests tell whether files are what was written. Decoding tells that what was written can be read: every
chunk is there and matches its crc32c, and its values are those that were staged. Never imports torch.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Iterable, Mapping

import msgspec
import xxhash

from asyncckpt.errors import CorruptCheckpointError, StorageError
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.files import decode_chunk, read_shard_index
from asyncckpt.format.header import Header, InlineTensor
from asyncckpt.format.index import FileRecord
from asyncckpt.format.layout import ArrayLayout, FilePart
from asyncckpt.format.limits import MAX_DIMENSIONS, MAX_METADATA_BYTES
from asyncckpt.format.metadata import decode_array_metadata
from asyncckpt.model import Damage, VerifyReport
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.names import HEADER
from asyncckpt.repository.verify import tensor_paths, verify_step
from asyncckpt.restore.buffers import ThreadBuffers

__all__ = ["verify_deep"]

_METADATA = "zarr.json"
_CACHED_BYTES = 4 * 2**20


def verify_deep(committed: CommittedStep, threads: int = 4, *, sample: float = 1.0, seed: int = 0) -> VerifyReport:
    """`verify_step`, and decode all that is read. Each thread holds one file of at most about 256 MiB.

    Raises:
        InvalidOptionError, CheckpointNotFoundError, UnsupportedFormatError, StorageError: as `verify_step`.
    """
    return verify_step(committed, threads, sample=sample, seed=seed, comparison=_Decoding)


class _Decoding:
    """A `Comparison`. Layouts are read when the first file of their array is, and kept."""

    def __init__(self, committed: CommittedStep, records: Mapping[str, FileRecord]) -> None:
        self._committed = committed
        self._records = records
        self._buffers = ThreadBuffers()
        self._lock = threading.Lock()
        self._arrays: dict[str, dict[str, FilePart]] = {}
        self._layouts: dict[str, ArrayLayout] = {}

    def compare(self, record: FileRecord) -> int:
        array, _, name = record.key.rpartition("/")
        if name == _METADATA:
            if not _is_group(self._read(record, MAX_METADATA_BYTES)):
                self._layout(array)
            return record.bytes
        layout, parts = self._layout(array)
        if name not in parts:
            raise CorruptCheckpointError("it is no chunk of its array")
        stored = self._read(record, layout.max_stored_bytes)
        if _decoded_digest(layout, parts[name], stored) != record.raw:
            raise CorruptCheckpointError("it does not decode to what was saved")
        return record.bytes

    def conclude(self) -> Iterable[Damage]:
        """What no file shows: tensors without array, arrays without chunks, counts that are wrong."""
        header = self._committed.header
        arrays = {key.rpartition("/")[0] for key in self._records if not key.endswith(f"/{_METADATA}")}
        try:
            needed = tensor_paths(self._committed).keys() - header.inline.keys()
        except CorruptCheckpointError:
            return  # reported by whoever names the tensors
        for key in sorted(needed - arrays):
            yield Damage(f"{key}/{_METADATA}", "a tensor of the state is not in the checkpoint", key)
        for key, inline in header.inline.items():
            if not _is_whole(inline):
                yield Damage(HEADER, "an inline tensor contradicts itself", key)
        missing = [damage for key in sorted(arrays) for damage in self._missing_chunks(key)]
        yield from missing
        if len(self._layouts) == len(arrays):
            yield from self._wrong_counts(header)

    def _missing_chunks(self, array: str) -> Iterable[Damage]:
        try:
            _, parts = self._layout(array)
        except (CorruptCheckpointError, StorageError):
            return  # reported with its file
        for name in parts:
            if f"{array}/{name}" not in self._records:
                yield Damage(f"{array}/{name}", "this chunk is not in the index", array)

    def _wrong_counts(self, header: Header) -> Iterable[Damage]:
        raw_bytes = sum(layout.num_bytes for layout in self._layouts.values())
        raw_bytes += sum(_inline_bytes(inline) for inline in header.inline.values())
        if (header.arrays, header.raw_bytes) != (len(self._layouts), raw_bytes):
            yield Damage(
                HEADER,
                f"it announces {header.arrays} arrays and {header.raw_bytes} bytes of tensors; "
                f"there are {len(self._layouts)} and {raw_bytes}",
            )

    def _layout(self, array: str) -> tuple[ArrayLayout, dict[str, FilePart]]:
        with self._lock:
            if array not in self._layouts:
                record = self._records.get(f"{array}/{_METADATA}")
                if record is None:
                    raise CorruptCheckpointError("its array is not in the index")
                layout, _ = decode_array_metadata(bytes(self._read(record, MAX_METADATA_BYTES)))
                if layout.num_files >= len(self._records):
                    raise CorruptCheckpointError(f"some of the {layout.num_files} files of this array are missing")
                self._arrays[array] = {part.key: part for part in layout.files()}
                self._layouts[array] = layout
            return self._layouts[array], self._arrays[array]

    def _read(self, record: FileRecord, limit: int) -> memoryview:
        """The contents, checked; valid until the same thread reads again."""
        if record.bytes > limit:
            raise CorruptCheckpointError(f"it cannot have {record.bytes} bytes")
        data = self._buffers.get(record.bytes)
        key = f"{self._committed.prefix}/{record.key}"
        self._committed.store.read_into(key, data, cache=record.bytes < _CACHED_BYTES)
        if xxhash.xxh3_128_hexdigest(data) != record.stored:
            raise CorruptCheckpointError("the contents differ from what was written")
        return data


def _is_group(metadata: memoryview) -> bool:
    try:
        found = msgspec.json.decode(metadata)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise CorruptCheckpointError(f"it is no metadata: {error}") from error
    return isinstance(found, dict) and found.get("zarr_format") == 3 and found.get("node_type") == "group"


def _is_whole(inline: InlineTensor) -> bool:
    if len(inline.shape) > MAX_DIMENSIONS or min(inline.shape, default=0) < 0:
        return False
    try:
        return len(base64.b64decode(inline.data, validate=True)) == _inline_bytes(inline)
    except ValueError:
        return False


def _inline_bytes(inline: InlineTensor) -> int:
    return math.prod(inline.shape) * DATA_TYPES[inline.dtype].itemsize if inline.dtype in DATA_TYPES else -1


def _decoded_digest(layout: ArrayLayout, part: FilePart, stored: memoryview) -> str:
    """XXH3-128 of the raw bytes in a file, decoded chunk by chunk."""
    entries = read_shard_index(layout, stored)
    digest = xxhash.xxh3_128()
    room = memoryview(bytearray(layout.chunk_bytes))
    for slot, start, stop in layout.chunks(part):
        out = room[: stop - start]
        decode_chunk(layout, entries[slot], stored, out)
        digest.update(out)
    return digest.hexdigest()
