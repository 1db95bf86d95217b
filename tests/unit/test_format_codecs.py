"""Codec chains: every one that is accepted round-trips, and nothing hostile gets further than an error."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs import blosc, zstd

from asyncckpt.errors import CorruptCheckpointError, InvalidOptionError
from asyncckpt.format.chunks import ChunkCodec
from asyncckpt.format.codecs import check_codecs, resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES

Chain = list[dict[str, Any]]

MiB = 2**20
UINT8 = DATA_TYPES["uint8"]
BYTES = {"name": "bytes"}
CRC = {"name": "crc32c"}
BLOSC, ZSTD, GZIP = {"name": "blosc"}, {"name": "zstd"}, {"name": "gzip"}
COMPRESSORS = [BLOSC, ZSTD, GZIP]


def codec(*chain: dict[str, Any]) -> ChunkCodec:
    return ChunkCodec(resolve_codecs([BYTES, *chain], UINT8))


def noise(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


def decode(coder: ChunkCodec, stored: bytes, num_bytes: int) -> bytes:
    out = bytearray(num_bytes)
    coder.decode_into(stored, memoryview(out))
    return bytes(out)


def crc_of(data: bytes) -> bytes:
    return bytes(google_crc32c.value(data).to_bytes(4, "little"))


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [[], [BLOSC], [ZSTD], [GZIP], [ZSTD, GZIP, CRC]], ids=str)
@pytest.mark.parametrize("raw", [noise(100_001), bytes(100_001)], ids=["noise", "zeros"])
def test_chunks_written_without_compressing_decode_with_the_same_codecs(chain: Chain, raw: bytes) -> None:
    coder = codec(*chain)
    stored = b"".join(coder.encode(raw, compress=False))
    assert decode(coder, stored, len(raw)) == raw


@pytest.mark.parametrize("chain", [[BLOSC], [GZIP]], ids=str)
def test_what_can_be_stored_as_it_is_costs_no_work(chain: Chain) -> None:
    zeros = bytes(100_000)
    assert sum(map(len, codec(*chain).encode(zeros, compress=False))) > len(zeros)
    assert sum(map(len, codec(*chain).encode(zeros))) < len(zeros) / 10


@pytest.mark.parametrize("preset", ["fast", "small", "none"])
@pytest.mark.parametrize("name", DATA_TYPES)
def test_presets_round_trip_every_data_type(preset: Any, name: str) -> None:
    data_type = DATA_TYPES[name]
    chain = resolve_codecs(preset, data_type)
    check_codecs(list(chain), data_type)
    assert chain[0].get("configuration") == ({"endian": "little"} if data_type.itemsize > 1 else None)
    assert chain[-1] == CRC
    for raw in (noise(997 * data_type.itemsize), bytes(997 * data_type.itemsize)):
        coder = ChunkCodec(chain)
        assert decode(coder, b"".join(coder.encode(raw)), len(raw)) == raw


CHAINS: list[Chain] = [
    [],
    *([one] for one in [*COMPRESSORS, CRC]),
    *(list(pair) for pair in product([*COMPRESSORS, CRC], repeat=2)),
    [CRC, BLOSC, CRC, ZSTD, CRC, GZIP, CRC],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(one["name"] for one in chain) or "bytes")
@pytest.mark.parametrize("num_bytes", [1, 15, 4096, 300_001])
def test_every_order_of_codecs_round_trips(chain: Chain, num_bytes: int) -> None:
    coder = codec(*chain)
    for raw in (noise(num_bytes), bytes(num_bytes), (b"asyncckpt" * num_bytes)[:num_bytes]):
        assert decode(coder, b"".join(coder.encode(raw)), num_bytes) == raw


@pytest.mark.parametrize(
    "settings",
    [
        *({"cname": cname} for cname in ("lz4", "lz4hc", "blosclz", "zstd", "zlib")),
        *({"shuffle": shuffle} for shuffle in ("noshuffle", "shuffle", "bitshuffle")),
        {"clevel": 0}, {"clevel": 9}, {"blocksize": 2**16}, {"typesize": 255}, {"typesize": 8},
    ],
)  # fmt: skip
def test_every_setting_of_blosc_round_trips(settings: dict[str, Any]) -> None:
    coder = codec({"name": "blosc", "configuration": settings})
    raw = b"12345678" * 5000 + noise(100)
    assert decode(coder, b"".join(coder.encode(raw)), len(raw)) == raw


@pytest.mark.parametrize(
    "one",
    [
        *({"name": "gzip", "configuration": {"level": level}} for level in (0, 9)),
        *({"name": "zstd", "configuration": {"level": level}} for level in (-5, 22)),
        {"name": "zstd", "configuration": {"checksum": True}},
    ],
)
def test_every_level_round_trips(one: dict[str, Any]) -> None:
    raw = b"12345678" * 5000 + noise(100)
    assert decode(codec(one), b"".join(codec(one).encode(raw)), len(raw)) == raw


@pytest.mark.parametrize("preset", ["fast", "small"])
def test_a_chunk_that_does_not_shrink_is_a_stored_blosc_frame(preset: Any) -> None:
    coder, raw = ChunkCodec(resolve_codecs(preset, UINT8)), noise(MiB)
    frame = b"".join(coder.encode(raw))[:-4]
    assert frame[2] & 0x02  # "memcpyed" of the blosc 1 chunk format
    assert frame[16:] == raw
    assert blosc.decompress(frame) == raw


def test_what_zlib_and_numcodecs_write_is_what_zarr_means() -> None:
    raw = b"asyncckpt" * 1000
    assert gzip.decompress(b"".join(codec(GZIP).encode(raw))) == raw
    assert zstd.decompress(b"".join(codec(ZSTD).encode(raw))) == raw
    assert b"".join(codec(CRC).encode(raw)) == raw + crc_of(raw)


def test_any_buffer_can_be_encoded() -> None:
    raw = noise(4096)
    for chain in CHAINS:
        coder = codec(*chain)
        assert b"".join(coder.encode(memoryview(bytearray(raw)))) == b"".join(coder.encode(raw))


# -- options ---------------------------------------------------------------------------------------


def test_settings_left_out_are_filled_in_because_readers_insist_on_them() -> None:
    chain = resolve_codecs([BYTES, BLOSC, ZSTD, GZIP, CRC], DATA_TYPES["bfloat16"])
    assert [dict(one) for one in chain] == [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {
            "name": "blosc",
            "configuration": {"typesize": 2, "cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0},
        },
        {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
        {"name": "gzip", "configuration": {"level": 5}},
        {"name": "crc32c"},
    ]


def with_settings(name: str, **settings: Any) -> Chain:
    return [BYTES, {"name": name, "configuration": settings}]


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ("best", "must be one of 'fast', 'small', 'none'"),
        ([], "non-empty list"),
        ({"name": "bytes"}, "non-empty list"),
        (None, "non-empty list"),
        (["bytes"], "non-empty list"),
        ([BYTES, "blosc"], "non-empty list"),
        ([{1, 2}], "a preset or a list of codecs"),
        (LOOP, "a preset or a list of codecs"),
        ([BLOSC], "first codec must be 'bytes'"),
        ([{"name": "bytes", "configuration": {"endian": "big"}}], "first codec must be 'bytes'"),
        ([BYTES, BYTES], "not supported"),
        ([BYTES, {}], "not supported"),
        ([BYTES, {"name": "lz5"}], "not supported"),
        ([BYTES, {"name": ["blosc"]}], "not supported"),
        ([BYTES, {"name": "sharding_indexed"}], "not supported"),
        ([BYTES, {"name": "crc32c", "must_understand": False}], "not supported"),
        (with_settings("crc32c", seed=1), "has the settings none"),
        (with_settings("gzip", level=5, speed=1), "has the settings level"),
        ([BYTES, {"name": "gzip", "configuration": [1]}], "has the settings level"),
        (with_settings("gzip", level=10), "does not understand level"),
        (with_settings("gzip", level=True), "does not understand level"),
        (with_settings("gzip", level="5"), "does not understand level"),
        (with_settings("zstd", level=23), "does not understand level"),
        (with_settings("zstd", checksum=1), "does not understand checksum"),
        (with_settings("blosc", cname="snappy"), "does not understand cname"),
        (with_settings("blosc", cname=["lz4"]), "does not understand cname"),
        (with_settings("blosc", clevel=10), "does not understand clevel"),
        (with_settings("blosc", shuffle=1), "does not understand shuffle"),
        (with_settings("blosc", blocksize=-1), "does not understand blocksize"),
        (with_settings("blosc", blocksize=2**31), "does not understand blocksize"),
        (with_settings("blosc", typesize=0), "does not understand typesize"),
        (with_settings("blosc", typesize=256), "does not understand typesize"),
    ],
)
def test_compression_that_cannot_be_written_is_refused_at_once(compression: Any, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        resolve_codecs(compression, UINT8)


@pytest.mark.parametrize(
    ("chain", "name"),
    [
        ([], "uint8"),
        ([CRC], "uint8"),
        ([BYTES], "float32"),
        ([{"name": "bytes", "configuration": {"endian": "little"}}], "uint8"),
        ([BYTES, BLOSC], "uint8"),  # in metadata every setting is written out
        ([BYTES, 5], "uint8"),
    ],
)
def test_metadata_must_have_exactly_the_chain_that_is_written(chain: Any, name: str) -> None:
    with pytest.raises(InvalidOptionError):
        check_codecs(chain, DATA_TYPES[name])


# -- what is hostile -------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [*COMPRESSORS, CRC], ids=lambda one: one["name"])
def test_a_chunk_cut_anywhere_is_refused(one: dict[str, Any]) -> None:
    raw = b"asyncckpt" * 20 + noise(50)
    stored = b"".join(codec(one).encode(raw))
    for length in range(len(stored)):
        with pytest.raises(CorruptCheckpointError):
            decode(codec(one), stored[:length], len(raw))


@pytest.mark.parametrize("one", [BLOSC, GZIP, ZSTD], ids=lambda one: one["name"])
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_chunk_of_another_size_is_refused(one: dict[str, Any], difference: int) -> None:
    stored = b"".join(codec(one).encode(bytes(1000)))
    with pytest.raises(CorruptCheckpointError, match=r"instead of|does not decode to"):
        decode(codec(one), stored, 1000 + difference)


def test_a_plain_chunk_of_another_size_is_refused() -> None:
    for stored in (bytes(9), bytes(11), b""):
        with pytest.raises(CorruptCheckpointError, match="instead of 10"):
            decode(codec(), stored, 10)


@pytest.mark.parametrize("one", [*COMPRESSORS, CRC], ids=lambda one: one["name"])
def test_bytes_after_a_chunk_are_refused(one: dict[str, Any]) -> None:
    stored = b"".join(codec(one).encode(bytes(1000)))
    with pytest.raises(CorruptCheckpointError):
        decode(codec(one), stored + stored, 1000)


def blosc_frame(num_bytes: int, stored_bytes: int | None = None) -> bytes:
    frame = bytearray(blosc.compress(bytes(64 * MiB), b"lz4", 9, 1))
    frame[4:8] = num_bytes.to_bytes(4, "little")
    if stored_bytes is not None:
        frame[12:16] = stored_bytes.to_bytes(4, "little")
    return bytes(frame)


def zstd_frame(announced: bytes, descriptor: int) -> bytes:
    """A frame that decodes to 64 MiB and announces what it likes (RFC 8878, section 3.1.1)."""
    frame = zstd.compress(bytes(64 * MiB), 1)
    assert frame[4] >> 6 == 2
    body = frame[4 + 1 + (1 - (frame[4] >> 5 & 1)) + 4 :]
    window = b"" if descriptor >> 5 & 1 else frame[5:6]
    return bytes(frame[:4] + bytes([descriptor]) + window + announced + body)


BOMBS = {
    "blosc": (BLOSC, blosc_frame(64 * MiB)),
    "blosc that says 1000": (BLOSC, blosc_frame(1000)),
    "blosc that says 4 GiB": (BLOSC, blosc_frame(2**32 - 1)),
    "blosc of another length": (BLOSC, blosc_frame(1000, 17)),
    "gzip": (GZIP, gzip.compress(bytes(64 * MiB), 9)),
    "zstd": (ZSTD, zstd.compress(bytes(64 * MiB), 1)),
    "zstd that says 1000": (ZSTD, zstd_frame((1000).to_bytes(4, "little"), 0x80)),
    "zstd that says 2**64 - 1": (ZSTD, zstd_frame(b"\xff" * 8, 0xC0)),
    "zstd that says nothing": (ZSTD, zstd_frame(b"", 0x00)),
    "zstd twice": (ZSTD, zstd.compress(bytes(1000), 1) + zstd.compress(bytes(64 * MiB), 1)),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("below", [[], [BLOSC], [CRC, GZIP]], ids=["alone", "over blosc", "over crc32c and gzip"])
def test_bombs_are_refused_in_bounded_memory(name: str, below: Chain) -> None:
    one, stored = BOMBS[name]
    coder = codec(*below, one, CRC)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            decode(coder, stored + crc_of(stored), 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The bomb itself is copied for its checksum; one byte past the limit may have been decoded.
    assert peak < 2 * len(stored) + 64 * 1024


def test_the_size_of_a_zstd_frame_is_read_from_every_form_of_its_header() -> None:
    for num_bytes in (1, 255, 256, 257, 65_791, 65_792, 300_000):
        for level, checksum in ((1, False), (22, True)):
            coder = codec({"name": "zstd", "configuration": {"level": level, "checksum": checksum}})
            assert decode(coder, b"".join(coder.encode(bytes(num_bytes))), num_bytes) == bytes(num_bytes)


@pytest.mark.parametrize("one", COMPRESSORS, ids=lambda one: one["name"])
def test_any_changed_byte_gives_an_error_or_a_full_chunk(one: dict[str, Any]) -> None:
    """Compressors do not see every change, which is what crc32c is for; none may crash or end early."""
    generator = random.Random(0)
    raw = np.arange(600, dtype="<u2").tobytes()
    stored = b"".join(codec(one).encode(raw))
    errors = 0
    for _ in range(600):
        changed = bytearray(stored)
        for _ in range(generator.choice((1, 1, 3))):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            decode(codec(one), bytes(changed), len(raw))
        except CorruptCheckpointError:
            errors += 1
        with pytest.raises(CorruptCheckpointError):
            decode(codec(one, CRC), bytes(changed) + crc_of(stored), len(raw))
    assert errors > 0
