"""Whole chunk and shard files: a chunk, or several chunks followed by their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import xxhash

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.chunks import ChunkCodec
from asyncckpt.format.codecs import CodecJson
from asyncckpt.format.layout import ArrayLayout, FilePart

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "FileDigest",
    "FileEncoder",
    "decode_chunk",
    "decode_file",
    "decode_shard_index",
    "read_shard_index",
    "shard_index_bytes",
]

_CRC_BYTES = 4
_MISSING = 2**64 - 1
_MOST_CODECS = 1024


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What an encoded file came to.

    Attributes:
        stored_bytes: its size.
        stored: XXH3-128 of its bytes, 32 hex digits.
        raw: XXH3-128 of the raw bytes in it, without padding.
    """

    stored_bytes: int
    stored: str
    raw: str


# By identity, since codecs are not hashable and their JSON takes longer than a small chunk; kept alive by the entry.
_codecs: dict[int, tuple[tuple[CodecJson, ...], ChunkCodec]] = {}


def codec_of(layout: ArrayLayout) -> ChunkCodec:
    """The codec of the (inner) chunks of *layout*."""
    found = _codecs.get(id(layout.codecs))
    if found is not None and found[0] is layout.codecs:
        return found[1]
    codec = _codec(json.dumps(layout.codecs))
    if len(_codecs) >= _MOST_CODECS:
        _codecs.clear()
    _codecs[id(layout.codecs)] = (layout.codecs, codec)
    return codec


@lru_cache(maxsize=1024)
def _codec(codecs: str) -> ChunkCodec:
    return ChunkCodec(tuple(json.loads(codecs)))


def _always_compress(num_bytes: int) -> bool:
    return True


class FileEncoder:
    """Encodes one file, a chunk at a time: iterate over it once, and write the pieces in order.

    Each chunk is hashed, encoded and hashed again before the next one is touched, so that all but the
    first pass over it find it in the cache.

    Args:
        layout: of the array.
        part: which file.
        raw: all bytes of the array, C order, little endian.
        raw_digest: XXH3-128 of the raw bytes of this file, if it is known.
        before_chunk: called with the raw bytes of each chunk before it is encoded; whether to compress it.
    """

    def __init__(
        self,
        layout: ArrayLayout,
        part: FilePart,
        raw: memoryview,
        raw_digest: str | None = None,
        before_chunk: Callable[[int], bool] = _always_compress,
    ) -> None:
        self._layout = layout
        self._part = part
        self._raw = raw
        self._known_digest = raw_digest
        self._before_chunk = before_chunk
        self._raw_hash = xxhash.xxh3_128()
        self._stored_hash = xxhash.xxh3_128()
        self._num_raw = 0
        self._size = 0

    def __iter__(self) -> Iterator[tuple[Buffer, ...]]:
        """The pieces of each chunk, and those of the index at the end."""
        layout = self._layout
        codec = codec_of(layout)
        index: list[int] = [] if layout.shard_shape is None else [_MISSING] * (2 * layout.chunks_per_shard)
        for slot, start, stop in layout.chunks(self._part):
            chunk = self._raw[start:stop]
            if self._known_digest is None:
                self._raw_hash.update(chunk)
            self._num_raw += len(chunk)
            begin = self._size
            compress = self._before_chunk(len(chunk))
            yield self._noted(codec.encode(_padded(chunk, layout.chunk_bytes), compress=compress))
            if index:
                index[2 * slot : 2 * slot + 2] = begin, self._size - begin
        if index:
            encoded = np.array(index, dtype="<u8").tobytes()
            yield self._noted((encoded + google_crc32c.value(encoded).to_bytes(_CRC_BYTES, "little"),))

    def _noted(self, pieces: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
        for piece in pieces:
            self._stored_hash.update(piece)
            self._size += memoryview(piece).nbytes
        return pieces

    @property
    def raw_bytes(self) -> int:
        """Raw bytes that were encoded so far."""
        return self._num_raw

    @property
    def stored_bytes(self) -> int:
        """What they came to."""
        return self._size

    @property
    def digest(self) -> FileDigest:
        """What the file came to, once all of it was encoded."""
        raw = self._known_digest or self._raw_hash.hexdigest()
        return FileDigest(self._size, self._stored_hash.hexdigest(), raw)


def _padded(chunk: memoryview, chunk_bytes: int) -> memoryview:
    # Zarr chunks at the boundary are full size; what lies outside the array is the fill value, zero.
    if len(chunk) == chunk_bytes:
        return chunk
    full = bytearray(chunk_bytes)
    full[: len(chunk)] = chunk
    return memoryview(full)


def shard_index_bytes(layout: ArrayLayout) -> int:
    """Size of the index at the end of a shard, checksum included."""
    return layout.chunks_per_shard * 16 + _CRC_BYTES


def read_shard_index(layout: ArrayLayout, stored: memoryview) -> list[tuple[int, int]]:
    """Offset and size of each chunk slot of a shard, checked against the file's size and each other.

    Raises:
        CorruptCheckpointError: the index is damaged, points outside the file, or lets chunks overlap.
    """
    if layout.shard_shape is None:
        return [(0, len(stored))]
    body_bytes = len(stored) - shard_index_bytes(layout)
    if body_bytes < 0:
        raise CorruptCheckpointError("a shard is shorter than its index")
    return decode_shard_index(bytes(stored[body_bytes:]), body_bytes)


def decode_shard_index(data: bytes, body_bytes: int) -> list[tuple[int, int]]:
    """The same from the index alone: *data* is the end of a shard, after *body_bytes* of chunks.

    Raises:
        CorruptCheckpointError: see `read_shard_index`.
    """
    encoded = data[:-_CRC_BYTES]
    if google_crc32c.value(encoded) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise CorruptCheckpointError("a shard index does not match its crc32c")
    entries: list[tuple[int, int]] = [
        tuple(entry) for entry in np.frombuffer(encoded, dtype="<u8").reshape(-1, 2).tolist()
    ]
    free = 0
    for offset, size in sorted(entry for entry in entries if entry != (_MISSING, _MISSING)):
        if offset + size > body_bytes:
            raise CorruptCheckpointError("a shard index points outside its file")
        if offset < free:
            raise CorruptCheckpointError("chunks overlap in a shard")
        free = offset + size
    return entries


def decode_file(layout: ArrayLayout, part: FilePart, stored: memoryview, out: memoryview) -> None:
    """Decode a whole file into its place in *out*, which holds all bytes of the array.

    Raises:
        CorruptCheckpointError: the file is not one of this layout, or a chunk is missing.
    """
    entries = read_shard_index(layout, stored)
    for slot, start, stop in layout.chunks(part):
        decode_chunk(layout, entries[slot], stored, out[start:stop])


def decode_chunk(layout: ArrayLayout, entry: tuple[int, int], stored: memoryview, out: memoryview) -> None:
    """Decode one chunk, at *entry* = (offset, size) of the file, into *out*, its raw bytes without padding.

    Raises:
        CorruptCheckpointError: it is damaged or missing.
    """
    offset, size = entry
    if offset == _MISSING:
        raise CorruptCheckpointError("a chunk is missing from its shard")
    codec = codec_of(layout)
    data = stored[offset : offset + size]
    if len(out) == layout.chunk_bytes:
        codec.decode_into(data, out)
        return
    full = memoryview(bytearray(layout.chunk_bytes))
    codec.decode_into(data, full)
    out[:] = full[: len(out)]
