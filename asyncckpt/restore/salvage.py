"""Reads what is intact of a damaged step, and says what is not."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.index import FileRecord
from asyncckpt.model import Damage
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.restore.reader import TensorReader
from asyncckpt.stores.contract import Store

__all__ = ["salvage_all", "salvage_tensors"]

Salvaged = tuple[dict[str, torch.Tensor], list[Damage]]


def salvage_tensors(committed: CommittedStep, keys: Collection[str]) -> Salvaged:
    """Those of the arrays *keys* that are intact, and what is damaged. The header must be intact.

    Where the index is damaged, the checksums in the chunks decide.

    Raises:
        StorageError: the storage failed.
        StagingMemoryError: there is not enough memory.
    """
    records, damaged = _read_indexes(committed)
    reader = TensorReader(committed.store, committed.prefix)
    tensors = reader.read_inline(committed.header.inline, keys)
    wanted = [key for key in keys if key not in committed.header.inline]
    indexed = {record.key for record in records}
    if damaged:
        tensors.update(reader.read([key for key in wanted if f"{key}/zarr.json" not in indexed]))
        wanted = [key for key in wanted if f"{key}/zarr.json" in indexed]
    if wanted:
        reader.expect(records)
        tensors.update(reader.read(wanted))
    return tensors, [*damaged, *reader.damaged]


def _read_indexes(committed: CommittedStep) -> tuple[list[FileRecord], list[Damage]]:
    records: list[FileRecord] = []
    damaged: list[Damage] = []
    for reference in committed.header.indexes:
        try:
            records += committed.read_index_of(reference)
        except CorruptCheckpointError as error:
            damaged.append(Damage(f"{reference.key}/c.0", error.message))
    return records, damaged


def salvage_all(committed: CommittedStep) -> Salvaged:
    """Every intact array below ``state/``, by key, found by walking the directories; needs no header.

    Names, types and shapes are taken from the metadata of the arrays, for which then nothing vouches;
    values match the crc32c of their chunks.

    Raises:
        StorageError: the storage failed.
        StagingMemoryError: there is not enough memory.
    """
    reader = TensorReader(committed.store, committed.prefix)
    tensors = reader.read(sorted(_find_arrays(committed.store, committed.prefix)))
    return tensors, reader.damaged


def _find_arrays(store: Store, prefix: str) -> Iterator[str]:
    """Directories with chunk files: their metadata may be what is damaged."""
    pending = ["state"]
    while pending:
        key = pending.pop()
        entries = store.entries(f"{prefix}/{key}")
        pending += [f"{key}/{entry.name}" for entry in entries if entry.is_directory]
        if any(not entry.is_directory and (entry.name == "c" or entry.name.startswith("c.")) for entry in entries):
            yield key
