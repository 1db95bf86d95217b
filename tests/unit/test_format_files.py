"""Chunk and shard files: what is written decodes to the same bytes, and a damaged shard index is refused."""

from __future__ import annotations

import random
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.files import FileDigest, FileEncoder, decode_file, read_shard_index
from asyncckpt.format.layout import ArrayLayout, FilePart, plan_layout

MISSING = 2**64 - 1
CHUNK = 64
COMPRESSIONS = ["fast", "small", "none", [{"name": "bytes"}], [{"name": "bytes"}, {"name": "gzip"}]]
SHAPES = [(), (1,), (64,), (65,), (1000,), (3, 50), (7, 3, 40), (2, 1, 130), (33, 1), (5, 64)]


def plan(shape: tuple[int, ...], compression: Any = "fast", name: str = "uint8") -> ArrayLayout:
    data_type = DATA_TYPES[name]
    codecs = resolve_codecs(compression, data_type)
    return plan_layout(shape, data_type, codecs, chunk_bytes=CHUNK, shard_bytes=4 * CHUNK)


def noise(num_bytes: int) -> memoryview:
    return memoryview(random.Random(num_bytes).randbytes(num_bytes))


def encode(layout: ArrayLayout, part: FilePart, raw: memoryview) -> tuple[bytes, FileDigest]:
    encoder = FileEncoder(layout, part, raw)
    stored = b"".join(bytes(piece) for chunk in encoder for piece in chunk)
    return stored, encoder.digest


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["uint8", "bfloat16", "complex128"])
@pytest.mark.parametrize("shape", SHAPES)
def test_files_decode_to_what_they_were_made_of(compression: Any, name: str, shape: tuple[int, ...]) -> None:
    layout = plan(shape, compression, name)
    raw = noise(layout.num_bytes)
    out = bytearray(layout.num_bytes)
    for part in layout.files():
        stored, digest = encode(layout, part, raw)
        assert digest.stored_bytes == len(stored)
        assert digest.stored == xxhash.xxh3_128_hexdigest(stored)
        assert digest.raw == xxhash.xxh3_128_hexdigest(raw[part.start : part.stop])
        before = bytes(out)
        decode_file(layout, part, memoryview(stored), memoryview(out))
        # Nothing outside its part is touched.
        assert out[: part.start] == before[: part.start]
        assert out[part.stop :] == before[part.stop :]
    assert out == raw


def test_chunks_at_the_boundary_are_padded_with_zeros() -> None:
    layout = plan((129,), [{"name": "bytes"}])
    assert (layout.chunk_shape, layout.shard_shape) == ((48,), (144,))
    layout = ArrayLayout((100,), layout.data_type, (64,), (128,), layout.codecs)
    (part,) = layout.files()
    raw = noise(100)
    stored, _ = encode(layout, part, raw)
    assert stored[:128] == bytes(raw) + bytes(28)


def four_chunks_of_50() -> ArrayLayout:
    data_type = DATA_TYPES["uint8"]
    return ArrayLayout((200,), data_type, (50,), (200,), resolve_codecs([{"name": "bytes"}], data_type))


def test_a_shard_is_its_chunks_and_then_their_index() -> None:
    layout = four_chunks_of_50()
    (part,) = layout.files()
    raw = noise(200)
    stored, _ = encode(layout, part, raw)
    index = np.array([[0, 50], [50, 50], [100, 50], [150, 50]], dtype="<u8").tobytes()
    assert stored == bytes(raw) + index + google_crc32c.value(index).to_bytes(4, "little")


def test_slots_outside_the_array_are_marked_missing() -> None:
    data_type = DATA_TYPES["uint8"]
    layout = ArrayLayout((100,), data_type, (40,), (80,), resolve_codecs("none", data_type))
    last = list(layout.files())[-1]
    stored, _ = encode(layout, last, noise(100))
    assert read_shard_index(layout, memoryview(stored)) == [(0, 44), (MISSING, MISSING)]
    out = bytearray(100)
    decode_file(layout, last, memoryview(stored), memoryview(out))
    assert out[80:] == noise(100)[80:]


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def shard() -> tuple[ArrayLayout, FilePart, bytes]:
    layout = four_chunks_of_50()
    (part,) = layout.files()
    return layout, part, encode(layout, part, noise(200))[0]


def with_index(stored: bytes, entries: list[tuple[int, int]]) -> memoryview:
    index = np.array(entries, dtype="<u8").tobytes()
    return memoryview(stored[:200] + index + google_crc32c.value(index).to_bytes(4, "little"))


Shard = tuple[ArrayLayout, FilePart, bytes]
GOOD = [(0, 50), (50, 50), (100, 50), (150, 50)]


@pytest.mark.parametrize(
    ("slot", "entry", "message"),
    [
        (1, (MISSING, MISSING), "a chunk is missing"),
        (0, (MISSING, 50), "points outside"),
        (0, (0, MISSING), "points outside"),
        (3, (151, 50), "points outside"),
        (3, (2**63, 2**63), "points outside"),
        (1, (49, 50), "chunks overlap"),
        (2, (0, 50), "chunks overlap"),
        (3, (150, 49), "49 bytes instead of 50"),
        (3, (200, 0), "0 bytes instead of 50"),
    ],
)
def test_an_index_that_lies_is_refused(shard: Shard, slot: int, entry: tuple[int, int], message: str) -> None:
    layout, part, stored = shard
    entries = [*GOOD[:slot], entry, *GOOD[slot + 1 :]]
    with pytest.raises(CorruptCheckpointError, match=message):
        decode_file(layout, part, with_index(stored, entries), memoryview(bytearray(200)))


def test_chunks_may_lie_in_any_order(shard: Shard) -> None:
    """Zarr allows it, and so does the document."""
    layout, part, stored = shard
    out = bytearray(200)
    decode_file(layout, part, with_index(stored, GOOD[::-1]), memoryview(out))
    assert bytes(out) == stored[150:200] + stored[100:150] + stored[50:100] + stored[:50]


def test_every_changed_byte_of_an_index_is_noticed(shard: Shard) -> None:
    layout, part, stored = shard
    for position in range(200, len(stored)):
        changed = bytearray(stored)
        changed[position] ^= 1
        with pytest.raises(CorruptCheckpointError, match="shard index does not match"):
            decode_file(layout, part, memoryview(changed), memoryview(bytearray(200)))


def test_a_shard_cut_anywhere_is_refused(shard: Shard) -> None:
    layout, part, stored = shard
    for length in range(len(stored)):
        with pytest.raises(CorruptCheckpointError, match=r"shorter than its index|shard index"):
            decode_file(layout, part, memoryview(stored[:length]), memoryview(bytearray(200)))


def test_a_damaged_chunk_of_a_shard_is_refused() -> None:
    layout = plan((200,), "none")
    (part,) = layout.files()
    stored = bytearray(encode(layout, part, noise(200))[0])
    stored[120] ^= 1
    with pytest.raises(CorruptCheckpointError, match="does not match its crc32c"):
        decode_file(layout, part, memoryview(stored), memoryview(bytearray(200)))


def test_a_damaged_padded_chunk_is_refused() -> None:
    data_type = DATA_TYPES["uint8"]
    layout = ArrayLayout((100,), data_type, (64,), (128,), resolve_codecs("none", data_type))
    (part,) = layout.files()
    stored = bytearray(encode(layout, part, noise(100))[0])
    stored[68 + 63] ^= 1  # in the padding of the second chunk
    with pytest.raises(CorruptCheckpointError, match="does not match its crc32c"):
        decode_file(layout, part, memoryview(stored), memoryview(bytearray(100)))
