"""The index of one rank: every file it wrote, with sizes and digests, as a small Zarr array."""

from __future__ import annotations

from collections.abc import Container, Sequence

import google_crc32c
import msgspec
import xxhash

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.limits import MAX_FILE_BYTES, MAX_INDEX_BYTES
from asyncckpt.format.paths import check_key

__all__ = ["FileRecord", "IndexRef", "decode_index", "encode_index", "index_key"]

_CRC_BYTES = 4


class FileRecord(msgspec.Struct, frozen=True, array_like=True):
    """One file of a step.

    Attributes:
        key: relative to the step.
        bytes: stored size.
        stored: XXH3-128 of the stored bytes, 32 hex digits.
        raw: XXH3-128 of the bytes before encoding, padding excluded; for metadata the same as ``stored``.
    """

    key: str
    bytes: int
    stored: str
    raw: str


class IndexRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a header names an index.

    Attributes:
        rank: who wrote it.
        key: its array, ``index/rank-00000``.
        bytes: size of the chunk file ``c.0``.
        digest: XXH3-128 of the chunk file.
        metadata_digest: XXH3-128 of its ``zarr.json``.
    """

    rank: int
    key: str
    bytes: int
    digest: str
    metadata_digest: str


_decode_records = msgspec.json.Decoder(list[FileRecord]).decode


def encode_index(records: Sequence[FileRecord], *, rank: int = 0) -> tuple[bytes, bytes, IndexRef]:
    """``zarr.json``, chunk file and reference of the index array that holds *records*."""
    payload = msgspec.json.encode(list(records))
    chunk = payload + google_crc32c.value(payload).to_bytes(_CRC_BYTES, "little")
    metadata = msgspec.json.encode(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [len(payload)],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [len(payload)]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
            "attributes": {},
        }
    )
    reference = IndexRef(
        rank,
        index_key(rank),
        len(chunk),
        xxhash.xxh3_128_hexdigest(chunk),
        xxhash.xxh3_128_hexdigest(metadata),
    )
    return metadata, chunk, reference


def index_key(rank: int) -> str:
    """The array that holds the index of *rank*: ``index/rank-00000``."""
    return f"index/rank-{rank:05d}"


def decode_index(reference: IndexRef, metadata: bytes, chunk: bytes) -> list[FileRecord]:
    """The records of an index, after checking both of its files against *reference*.

    Raises:
        CorruptCheckpointError: they are not the files the header names.
    """
    if len(chunk) > MAX_INDEX_BYTES:
        raise CorruptCheckpointError(f"{reference.key} is over the limit of {MAX_INDEX_BYTES} bytes", key=reference.key)
    if xxhash.xxh3_128_hexdigest(metadata) != reference.metadata_digest:
        raise CorruptCheckpointError(f"{reference.key}/zarr.json does not match its digest", key=reference.key)
    if len(chunk) != reference.bytes or xxhash.xxh3_128_hexdigest(chunk) != reference.digest:
        raise CorruptCheckpointError(f"{reference.key}/c.0 does not match its digest", key=reference.key)
    try:
        records = _decode_records(chunk[:-_CRC_BYTES])
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise CorruptCheckpointError(f"{reference.key} is not an index: {error}", key=reference.key) from error
    keys: set[str] = set()
    for record in records:
        _check(record, keys)
        keys.add(record.key)
    return records


def _check(record: FileRecord, keys: Container[str]) -> None:
    key = check_key(record.key)
    if record.bytes < 0:
        raise CorruptCheckpointError(f"{key} has a negative size", key=key)
    if record.bytes > 2 * MAX_FILE_BYTES:  # stored ones are hardly larger than raw ones
        raise CorruptCheckpointError(f"{key} cannot have {record.bytes} bytes", key=key)
    if key in keys:
        raise CorruptCheckpointError(f"{key} is in the index twice", key=key)
    if key == "zarr.json" or key.startswith("index/rank-"):
        raise CorruptCheckpointError(f"{key} cannot be in the index: only the header vouches for it", key=key)
