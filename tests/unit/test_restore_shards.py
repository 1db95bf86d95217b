"""Shard files read block by block: the same bytes as read at once, and the same refusals."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.files import FileEncoder, shard_index_bytes
from asyncckpt.format.index import FileRecord
from asyncckpt.format.layout import ArrayLayout, FilePart, plan_layout
from asyncckpt.restore import shards
from asyncckpt.restore.buffers import ThreadBuffers
from asyncckpt.restore.shards import decode_shard

UINT8 = DATA_TYPES["uint8"]


class Stored:
    """One shard file in memory."""

    def __init__(self, layout: ArrayLayout, part: FilePart, raw: bytes) -> None:
        self.layout, self.part, self.raw = layout, part, raw
        encoder = FileEncoder(layout, part, memoryview(raw))
        self.data = bytearray(b"".join(piece for chunk in encoder for piece in chunk))
        self.record = FileRecord("key", len(self.data), encoder.digest.stored, encoder.digest.raw)
        self.num_reads = 0

    def read(self, out: memoryview, offset: int) -> int:
        self.num_reads += 1
        found = self.data[offset : offset + len(out)]
        out[: len(found)] = found
        return len(found)

    def decode(self) -> bytes:
        out = bytearray(len(self.raw))
        decode_shard(self.read, self.layout, self.part, self.record, memoryview(out), ThreadBuffers())
        return bytes(out[self.part.start : self.part.stop])


def store(num_bytes: int, compression: Any = "none", chunk_bytes: int = 64, shard_bytes: int = 2**20) -> Stored:
    layout = plan_layout(
        (num_bytes,), UINT8, resolve_codecs(compression, UINT8), chunk_bytes=chunk_bytes, shard_bytes=shard_bytes
    )
    raw = random.Random(num_bytes).randbytes(num_bytes)
    return Stored(layout, next(iter(layout.files())), raw)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "STREAMED_BYTES", 100)


@given(
    num_bytes=st.integers(65, 3000),
    compression=st.sampled_from(["none", "fast", "small"]),
    chunk_bytes=st.integers(1, 300),
    shard_bytes=st.integers(300, 3000),
)
def test_what_is_decoded_is_what_was_encoded(
    num_bytes: int, compression: str, chunk_bytes: int, shard_bytes: int
) -> None:
    stored = store(max(num_bytes, chunk_bytes + 1), compression, chunk_bytes, shard_bytes)
    assert stored.decode() == stored.raw[stored.part.start : stored.part.stop]


def test_it_is_read_in_blocks() -> None:
    stored = store(2000)
    stored.decode()
    assert stored.num_reads > len(stored.raw) / 100


def cut(stored: Stored) -> None:
    del stored.data[-1]


def cut_to_nothing(stored: Stored) -> None:
    stored.data.clear()


def grow(stored: Stored) -> None:
    stored.data.append(0)


def claim_less_than_an_index(stored: Stored) -> None:
    stored.record = FileRecord("key", 3, stored.record.stored, stored.record.raw)


def flip_a_chunk(stored: Stored) -> None:
    stored.data[10] ^= 1


def flip_the_index(stored: Stored) -> None:
    stored.data[-shard_index_bytes(stored.layout)] ^= 1


def expect_another(stored: Stored) -> None:
    stored.record = FileRecord("key", len(stored.data), xxhash.xxh3_128_hexdigest(b""), stored.record.raw)


def lose_a_chunk(stored: Stored) -> None:
    begin = -shard_index_bytes(stored.layout)
    stored.data[begin : begin + 16] = b"\xff" * 16
    stored.data[-4:] = google_crc32c.value(bytes(stored.data[begin:-4])).to_bytes(4, "little")
    stored.record = FileRecord("key", len(stored.data), xxhash.xxh3_128_hexdigest(stored.data), stored.record.raw)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_to_nothing,
        grow,
        claim_less_than_an_index,
        flip_a_chunk,
        flip_the_index,
        expect_another,
        lose_a_chunk,
    ],
)
@pytest.mark.parametrize("compression", ["none", [{"name": "bytes"}]])
def test_damage_is_noticed(damage: Callable[[Stored], None], compression: Any) -> None:
    stored = store(2000, compression)
    damage(stored)
    with pytest.raises(CorruptCheckpointError):
        stored.decode()


def test_bytes_between_chunks_count_too() -> None:
    """Zarr lets chunks leave gaps. The digest covers them."""
    stored = store(256, [{"name": "bytes"}])
    body = bytes(stored.data[: -shard_index_bytes(stored.layout)])
    gap = b"g" * 333
    index = np.array([[len(gap) + 64 * n, 64] for n in range(4)], dtype="<u8").tobytes()
    stored.data = bytearray(gap + body + gap + index + google_crc32c.value(index).to_bytes(4, "little"))
    stored.record = FileRecord("key", len(stored.data), xxhash.xxh3_128_hexdigest(stored.data), stored.record.raw)
    assert stored.decode() == stored.raw
    stored.data[5] ^= 1
    with pytest.raises(CorruptCheckpointError, match="digest"):
        stored.decode()


def test_a_file_that_gets_shorter_while_it_is_read_is_noticed() -> None:
    stored = store(2000)
    whole = bytes(stored.data)

    def read(out: memoryview, offset: int) -> int:
        count = stored.read(out, offset)
        del stored.data[500:]
        return count

    out = memoryview(bytearray(2000))
    with pytest.raises(CorruptCheckpointError, match="shorter"):
        decode_shard(read, stored.layout, stored.part, stored.record, out, ThreadBuffers())
    assert len(whole) == stored.record.bytes
