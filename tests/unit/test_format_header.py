"""The header of a step: its digest covers every byte, its members are checked, newer formats are not guessed at."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import xxhash

from asyncckpt.errors import CorruptCheckpointError, UnsupportedFormatError
from asyncckpt.format.header import (
    MAX_HEADER_BYTES,
    Header,
    IndexRef,
    InlineTensor,
    decode_header_file,
    encode_header_file,
    info_from_header,
)

DIGEST = "0123456789abcdef" * 2
MEMBERS: dict[str, Any] = {
    "format": 1,
    "step": 500,
    "kind": "regular",
    "nonce": "n0",
    "run": "r0",
    "created": "2026-01-02T03:04:05.678901+00:00",
    "world_size": 1,
    "tags": ["good"],
    "metrics": {"loss": 0.5},
    "metadata": {"data": {"$": "path", "value": "/data"}},
    "versions": {"torch": "2.9"},
    "tree": {"w": {"$": "tensor", "key": "state/w", "dtype": "float32", "shape": [2]}, "snow": "☃"},
    "inline": {"state/w": InlineTensor("float32", [2], "AAAAAAAAAAA=")},
    "arrays": 3,
    "raw_bytes": 2**45,
    "stored_bytes": 2**44,
    "indexes": [IndexRef(0, "index/rank-00000", 10, DIGEST, DIGEST)],
    "timings": {"encode_s": 1.5},
}


def header(**changes: Any) -> Header:
    return Header(**{**MEMBERS, **changes})


def document() -> Any:
    return json.loads(encode_header_file(header()))


def signed(tree: Any) -> bytes:
    """A file with a valid digest around any JSON whose last member is the digest."""
    data = json.dumps(tree, separators=(",", ":")).encode()
    start = data.rindex(b'"digest":"') + len('"digest":"')
    data = data[:start] + b"0" * 32 + data[start + 32 :]
    return data[:start] + xxhash.xxh3_128_hexdigest(data).encode() + data[start + 32 :]


def test_a_header_comes_back() -> None:
    data = encode_header_file(header())
    found = decode_header_file(data)
    assert found == header(digest=found.digest)
    assert data.endswith(f'"digest":"{found.digest}"}}}}}}'.encode())
    assert json.loads(data)["node_type"] == "group"
    assert list(json.loads(data)["attributes"]["asyncckpt"]) == [*MEMBERS, "digest"]


@pytest.mark.parametrize("finite", [True, False])
def test_whether_it_is_finite_comes_back(finite: bool) -> None:
    data = encode_header_file(header(finite=finite))
    assert decode_header_file(data).finite is finite
    assert info_from_header(decode_header_file(data), "/step").finite is finite
    assert list(json.loads(data)["attributes"]["asyncckpt"])[-3:] == ["timings", "finite", "digest"]


def test_what_nobody_knows_is_not_written() -> None:
    assert info_from_header(header(), "/step").finite is None
    tree = document()
    tree["attributes"]["asyncckpt"] = {**tree["attributes"]["asyncckpt"], "finite": None}
    members = tree["attributes"]["asyncckpt"]
    members["digest"] = members.pop("digest")
    with pytest.raises(CorruptCheckpointError):
        decode_header_file(signed(tree))


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place() -> None:
    data = encode_header_file(header())
    digest = decode_header_file(data).digest
    assert xxhash.xxh3_128_hexdigest(data.replace(digest.encode(), b"0" * 32)) == digest
    # Whatever the digest was before, the file is the same.
    assert encode_header_file(header(digest=DIGEST)) == data


def test_every_changed_byte_is_noticed() -> None:
    data = encode_header_file(header())
    for position in range(len(data)):
        for bit in (1, 0x80):
            changed = bytearray(data)
            changed[position] ^= bit
            with pytest.raises(CorruptCheckpointError, match="digest"):
                decode_header_file(bytes(changed))


def test_a_header_cut_or_extended_anywhere_is_refused() -> None:
    data = encode_header_file(header())
    for cut in (*(data[:length] for length in range(len(data))), data + b"\n", data + b" ", b"\0" * 4096):
        with pytest.raises(CorruptCheckpointError, match="does not end in its digest"):
            decode_header_file(cut)


def test_a_header_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(CorruptCheckpointError, match="more than the limit"):
        decode_header_file(bytes(MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize("number", [0, 2, 99, -1])
def test_other_formats_are_refused_whatever_else_is_in_them(number: int) -> None:
    tree = document()
    members = tree["attributes"]["asyncckpt"]
    tree["attributes"]["asyncckpt"] = {"format": number, "new": {"$": "thing"}, "digest": members["digest"]}
    with pytest.raises(UnsupportedFormatError, match=rf"has format {number}; this asyncckpt reads format 1") as caught:
        decode_header_file(signed(tree))
    assert caught.value.fields["format"] == number


WRONG: dict[str, list[Any]] = {
    "format": [None, "1", 1.5, True],
    "step": [None, "500", -1, 1.5],
    "kind": [None, 1],
    "nonce": [None, 1],
    "run": [None, 1],
    "created": [None, 1, "yesterday", "", "2026-01-02T03:04:05", "2026-01-02"],
    "world_size": [None, -1, "1"],
    "tags": [None, "good", [1]],
    "versions": [None, [], {"torch": 2}],
    "inline": [
        None, [], {"state/w": None}, {"../w": {"dtype": "float32", "shape": [2], "data": ""}},
        {"state/w": {"dtype": "float32", "shape": [2]}}, {"state/w": {"dtype": 1, "shape": [2], "data": ""}},
        {"state/w": {"dtype": "float32", "shape": 2, "data": ""}},
        {"state/w": {"dtype": "float32", "shape": [2], "data": "", "more": 1}},
    ],
    "arrays": [None, -1],
    "raw_bytes": [None, -1, 0.5],
    "stored_bytes": [None, -1],
    "indexes": [
        None, {}, [1], [{"rank": 0}],
        *([{"rank": 0, "key": "index/rank-00000", "bytes": 1, "digest": DIGEST, "metadata_digest": DIGEST, **wrong}]
          for wrong in ({"rank": -1}, {"key": "/index"}, {"bytes": -1}, {"digest": 1}, {"more": 1})),
    ],
    "timings": [None, [], {"encode_s": "fast"}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_every_member_is_checked(name: str, value: Any) -> None:
    tree = document()
    decode_header_file(signed(tree))
    tree["attributes"]["asyncckpt"][name] = value
    with pytest.raises(CorruptCheckpointError):
        decode_header_file(signed(tree))


@pytest.mark.parametrize("name", MEMBERS)
def test_no_member_may_be_missing(name: str) -> None:
    tree = document()
    del tree["attributes"]["asyncckpt"][name]
    with pytest.raises(CorruptCheckpointError, match="the header is malformed"):
        decode_header_file(signed(tree))


def test_unknown_members_are_refused() -> None:
    tree = document()
    tree["attributes"]["asyncckpt"] = {"more": 1, **tree["attributes"]["asyncckpt"]}
    with pytest.raises(CorruptCheckpointError, match="the header is malformed"):
        decode_header_file(signed(tree))


@pytest.mark.parametrize(("name", "value"), [("zarr_format", 2), ("node_type", "array")])
def test_a_header_is_a_zarr_group(name: str, value: Any) -> None:
    tree = document()
    tree[name] = value
    with pytest.raises(CorruptCheckpointError, match="not in a Zarr v3 group"):
        decode_header_file(signed(tree))


@pytest.mark.parametrize("data", [b'{"digest":"%s"}}}', b"[" * 100_000 + b'"digest":"%s"}}}', b'\xff"digest":"%s"}}}'])
def test_a_valid_digest_over_nonsense_is_no_header(data: bytes) -> None:
    data = data.replace(b"%s", b"0" * 32)
    data = data.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(data).encode())
    with pytest.raises(CorruptCheckpointError, match="the header is malformed"):
        decode_header_file(data)


# -- what it says ----------------------------------------------------------------------------------


def test_info_says_what_the_header_says() -> None:
    info = info_from_header(header(), "/runs/step-00000500")
    assert (info.step, info.kind, info.nonce, info.run, info.path) == (
        500,
        "regular",
        "n0",
        "r0",
        "/runs/step-00000500",
    )
    assert info.created == datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    assert (info.raw_bytes, info.stored_bytes, info.num_arrays, info.world_size, info.format) == (2**45, 2**44, 3, 1, 1)
    assert dict(info.metrics) == {"loss": 0.5}
    assert dict(info.metadata) == {"data": Path("/data")}
    assert dict(info.versions) == {"torch": "2.9"}
    assert info.tags == ("good",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": [1]}, "mappings"),
        ({"metrics": None}, "mappings"),
        ({"metrics": {"loss": "low"}}, "metrics are numbers"),
        ({"metrics": {"loss": True}}, "metrics are numbers"),
        ({"metadata": 1}, "mappings"),
        ({"metadata": {"a": {"$": "tensor", "key": "state/w"}}}, "unknown value"),
        ({"metadata": {"a": {"$": "int", "value": "ten"}}}, "malformed"),
    ],
)
def test_malformed_metrics_and_metadata_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        info_from_header(header(**changes), "")
