"""The index of a rank: a small Zarr array whose two files are pinned by the header."""

from __future__ import annotations

import json
from typing import Any

import google_crc32c
import msgspec
import pytest
import xxhash

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.index import FileRecord, IndexRef, decode_index, encode_index

DIGEST = "0123456789abcdef" * 2
RECORDS = [
    FileRecord("state/zarr.json", 60, DIGEST, DIGEST),
    FileRecord("state/model/a%2Fb/c.0.0", 2**31, DIGEST, DIGEST[::-1]),
]


def reference_to(metadata: bytes, chunk: bytes) -> IndexRef:
    digest = xxhash.xxh3_128_hexdigest
    return IndexRef(0, "index/rank-00000", len(chunk), digest(chunk), digest(metadata))


@pytest.mark.parametrize("records", [[], RECORDS[:1], RECORDS])
def test_records_come_back(records: list[FileRecord]) -> None:
    metadata, chunk, reference = encode_index(records, rank=3)
    assert reference.key == "index/rank-00003"
    assert reference == msgspec.structs.replace(reference_to(metadata, chunk), rank=3, key="index/rank-00003")
    assert decode_index(reference, metadata, chunk) == records


def test_the_array_is_one_chunk_of_json_and_its_checksum() -> None:
    metadata, chunk, _ = encode_index(RECORDS)
    payload = chunk[:-4]
    assert google_crc32c.value(payload).to_bytes(4, "little") == chunk[-4:]
    assert json.loads(payload) == [list(msgspec.to_builtins(record)) for record in RECORDS]
    found = json.loads(metadata)
    assert found["shape"] == found["chunk_grid"]["configuration"]["chunk_shape"] == [len(payload)]
    assert found["codecs"] == [{"name": "bytes"}, {"name": "crc32c"}]


def test_every_changed_or_missing_byte_is_noticed() -> None:
    metadata, chunk, reference = encode_index(RECORDS)
    for position in range(len(chunk)):
        changed = bytearray(chunk)
        changed[position] ^= 1
        with pytest.raises(CorruptCheckpointError, match=r"rank-00000/c\.0 does not match") as caught:
            decode_index(reference, metadata, bytes(changed))
        assert caught.value.fields["key"] == "index/rank-00000"
    for position in range(len(metadata)):
        changed = bytearray(metadata)
        changed[position] ^= 1
        with pytest.raises(CorruptCheckpointError, match=r"rank-00000/zarr\.json does not match"):
            decode_index(reference, bytes(changed), chunk)
    for cut in (b"", chunk[:-1], chunk + b"\0"):
        with pytest.raises(CorruptCheckpointError, match=r"c\.0 does not match"):
            decode_index(reference, metadata, cut)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "is not an index"),
        (b"{}", "is not an index"),
        (b"\xff", "is not an index"),
        (b"[" * 100_000, "is not an index"),
        ([["a", 1, DIGEST]], "is not an index"),
        ([["a", "1", DIGEST, DIGEST]], "is not an index"),
        ([[1, 1, DIGEST, DIGEST]], "is not an index"),
        ([["a", 1.5, DIGEST, DIGEST]], "is not an index"),
        ([["../a", 1, DIGEST, DIGEST]], "is not a key"),
        ([["/etc/passwd", 1, DIGEST, DIGEST]], "is not a key"),
        ([["a", -1, DIGEST, DIGEST]], "has a negative size"),
    ],
)
def test_an_index_with_the_right_digest_but_no_sense_is_refused(payload: Any, message: str) -> None:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    chunk = data + google_crc32c.value(data).to_bytes(4, "little")
    with pytest.raises(CorruptCheckpointError, match=message):
        decode_index(reference_to(b"{}", chunk), b"{}", chunk)
