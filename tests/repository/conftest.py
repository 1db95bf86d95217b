"""Real committed steps, made the way the writer makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from asyncckpt.format.header import FORMAT, Header, encode_header_file
from asyncckpt.format.index import FileRecord, encode_index
from asyncckpt.repository import CommittedStep, StepWriter, prepare_root
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]

FILES = {
    "state/zarr.json": b"{}",
    "state/w/zarr.json": b'{"shape":[3]}',
    "state/w/c.0": b"chunk of w",
    "state/big/zarr.json": b'{"shape":[9]}',
    "state/big/c.0.0": bytes(range(256)) * (5 * 2**20 // 256),
    "index/zarr.json": b"{}",
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return prepare_root(tmp_path / "root")


@pytest.fixture
def commit_step(store: LocalStore) -> CommitStep:
    """Commit one step: ``commit_step(500, tags=["good"], metrics={"loss": 1.0})``.

    With ``link_to=`` another step, its chunk files are linked, not written.
    """

    def commit(
        step: int, *, files: dict[str, bytes] = FILES, link_to: CommittedStep | None = None, **fields: Any
    ) -> CommittedStep:
        nonce = fields.pop("nonce", f"nonce-{step}")
        writer = StepWriter.begin(store, step, nonce)
        records = []
        for key, data in files.items():
            if link_to is None or key.endswith(".json"):
                writer.put(key, data)
            else:
                assert writer.link(f"{link_to.prefix}/{key}", key)
            digest = xxhash.xxh3_128_hexdigest(data)
            records.append(FileRecord(key, len(data), digest, digest))
        metadata, chunk, reference = encode_index(records, rank=0)
        writer.put(f"{reference.key}/zarr.json", metadata)
        writer.put(f"{reference.key}/c.0", chunk)
        writer.commit(encode_header_file(_header(step, nonce, reference, fields)))
        return CommittedStep(store, step)

    return commit


def _header(step: int, nonce: str, reference: Any, fields: dict[str, Any]) -> Header:
    values: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "kind": "regular",
        "nonce": nonce,
        "run": "run",
        "created": f"2026-01-01T00:{step // 60 % 60:02}:{step % 60:02}+00:00",
        "world_size": 1,
        "tags": [],
        "metrics": {},
        "metadata": {},
        "versions": {},
        "tree": {},
        "inline": {},
        "arrays": 2,
        "raw_bytes": 100,
        "stored_bytes": 50,
        "indexes": [reference],
        "timings": {},
    }
    return Header(**{**values, **fields})
