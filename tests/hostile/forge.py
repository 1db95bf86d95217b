"""Tampers with committed steps the way an attacker would: every digest and checksum is made valid again.

XXH3 and crc32c are no signatures. Whoever can write a step can write one whose digests agree, so what
a reader refuses must be refused for what it says and not for how it hashes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import google_crc32c
import xxhash

__all__ = ["Forge", "digest", "index_files", "seal_header", "seal_header_bytes", "with_crc"]

_TAIL_BYTES = len('"digest":"00000000000000000000000000000000"}}}')


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def with_crc(data: bytes) -> bytes:
    """*data* and its crc32c: a shard index, or a chunk without compressor."""
    return data + google_crc32c.value(data).to_bytes(4, "little")


def seal_header(header: dict[str, Any]) -> bytes:
    """The file of a header given as JSON values."""
    fields = {name: value for name, value in header.items() if name != "digest"}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"asyncckpt": {**fields, "digest": "0" * 32}}}
    return seal_header_bytes(json.dumps(group, separators=(",", ":")).encode())


def seal_header_bytes(data: bytes) -> bytes:
    """*data*, whose end is taken for an old digest, with a digest that fits."""
    body = data[:-_TAIL_BYTES]
    blank = body + b'"digest":"' + b"0" * 32 + b'"}}}'
    return body + b'"digest":"' + digest(blank).encode() + b'"}}}'


def index_files(payload: bytes) -> tuple[bytes, bytes]:
    """``zarr.json`` and ``c.0`` of an index with *payload*."""
    metadata = {
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
    return json.dumps(metadata, separators=(",", ":")).encode(), with_crc(payload)


class Forge:
    """One committed step, opened for tampering.

    Attributes:
        directory: the step.
        header: its header as JSON values.
        records: its index as JSON values; `seal` writes both.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.header: dict[str, Any] = json.loads((directory / "zarr.json").read_bytes())["attributes"]["asyncckpt"]
        self.records: list[list[Any]] = json.loads((directory / "index/rank-00000/c.0").read_bytes()[:-4])

    def read(self, key: str) -> bytes:
        return (self.directory / key).read_bytes()

    def put(self, key: str, data: bytes, raw: bytes | None = None) -> None:
        """Write *key* and its record; *raw* is what it decodes to, as far as anybody looks."""
        path = self.directory / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.records = [record for record in self.records if record[0] != key]
        self.records.append([key, len(data), digest(data), digest(data if raw is None else raw)])

    def edit(self, array: str, **changes: Any) -> None:
        """Change members of the ``zarr.json`` of *array*."""
        metadata = json.loads(self.read(f"{array}/zarr.json"))
        self.put(f"{array}/zarr.json", json.dumps({**metadata, **changes}).encode())

    def seal(self, payload: bytes | None = None) -> None:
        """Write index and header so that all digests agree.

        Args:
            payload: the text of the index; None writes `records`.
        """
        payload = json.dumps(self.records, separators=(",", ":")).encode() if payload is None else payload
        metadata, chunk = index_files(payload)
        folder = self.directory / "index/rank-00000"
        (folder / "zarr.json").write_bytes(metadata)
        (folder / "c.0").write_bytes(chunk)
        for reference in self.header["indexes"]:
            reference |= {"bytes": len(chunk), "digest": digest(chunk), "metadata_digest": digest(metadata)}
        (self.directory / "zarr.json").write_bytes(seal_header(self.header))

    def put_header(self) -> None:
        """Write the header alone."""
        (self.directory / "zarr.json").write_bytes(seal_header(self.header))
