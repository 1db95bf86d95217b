"""Reads a shard file block by block, and decodes each chunk while it is still in the cache."""

from __future__ import annotations

from collections.abc import Callable

import xxhash

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.files import decode_chunk, decode_shard_index, shard_index_bytes
from asyncckpt.format.index import FileRecord
from asyncckpt.format.layout import ArrayLayout, FilePart
from asyncckpt.restore.buffers import ThreadBuffers

__all__ = ["STREAMED_BYTES", "decode_shard"]

STREAMED_BYTES = 2 * 2**20
"""Files up to this size are read at once. Two threads with a block each stay within a shared cache of 8 MiB."""

Read = Callable[[memoryview, int], int]
"""Reads from an offset of the file; returns how many bytes there were."""


def decode_shard(
    read: Read, layout: ArrayLayout, part: FilePart, record: FileRecord, out: memoryview, buffers: ThreadBuffers
) -> None:
    """Decode a shard file into its place in *out*, which holds all bytes of the array.

    Args:
        read: reads the file.
        layout: of the array, sharded.
        part: which file.
        record: what the index of the step says of it.
        out: the array.
        buffers: give memory to read into.

    Raises:
        CorruptCheckpointError: the file is not what *record* says, or a chunk is damaged or missing; what was
            decoded by then is in *out*.
    """
    index_bytes = shard_index_bytes(layout)
    body_bytes = record.bytes - index_bytes
    tail = bytearray(index_bytes + 1)  # one more than there should be
    if body_bytes < 0 or read(memoryview(tail), body_bytes) != index_bytes:
        raise CorruptCheckpointError(f"it does not have {record.bytes} bytes")
    encoded = bytes(tail[:index_bytes])
    entries = decode_shard_index(encoded, body_bytes)
    chunks = sorted((*entries[slot], start, stop) for slot, start, stop in layout.chunks(part))
    if any(offset >= body_bytes for offset, _, _, _ in chunks):
        raise CorruptCheckpointError("a chunk is missing from its shard")
    largest = max(size for _, size, _, _ in chunks)
    blocks = _Blocks(read, body_bytes, buffers.get(STREAMED_BYTES + largest))
    for offset, size, start, stop in chunks:
        stored = blocks.at(offset, size)
        decode_chunk(layout, (0, size), stored, out[start:stop])
    if blocks.digest(encoded) != record.stored:
        raise CorruptCheckpointError("it does not match its digest")


class _Blocks:
    """The chunks of a file, in order of their offsets; hashes all bytes on the way.

    Invariant: ``_buffer[:_filled]`` are the bytes of the file from ``_start``.
    """

    def __init__(self, read: Read, num_bytes: int, buffer: memoryview) -> None:
        self._read = read
        self._num_bytes = num_bytes
        self._buffer = buffer
        self._start = self._filled = 0
        self._hash = xxhash.xxh3_128()

    def at(self, offset: int, size: int) -> memoryview:
        """Bytes of the file, valid until the next call."""
        while offset + size > self._start + self._filled:
            self._advance(offset)
        begin = offset - self._start
        return self._buffer[begin : begin + size]

    def digest(self, rest: bytes) -> str:
        """XXH3-128 of the file, which ends with *rest*."""
        while self._start + self._filled < self._num_bytes:
            self._advance(self._num_bytes)
        self._hash.update(rest)
        digest: str = self._hash.hexdigest()
        return digest

    def _advance(self, offset: int) -> None:
        """Read on; what lies before *offset* is needed no more."""
        end = self._start + self._filled
        keep = max(0, end - offset)
        self._buffer[:keep] = self._buffer[self._filled - keep : self._filled]
        wanted = min(len(self._buffer) - keep, self._num_bytes - end, STREAMED_BYTES)
        room = self._buffer[keep : keep + wanted]
        if self._read(room, end) != wanted:
            raise CorruptCheckpointError("it became shorter while it was read")
        self._hash.update(room)
        self._start, self._filled = end - keep, keep + wanted
