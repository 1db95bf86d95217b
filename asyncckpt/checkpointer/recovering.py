"""Salvages what is intact of a damaged step."""

from __future__ import annotations

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.model import CheckpointInfo, Damage, Recovered
from asyncckpt.repository.catalog import UNREADABLE, CommittedStep
from asyncckpt.repository.names import HEADER
from asyncckpt.repository.verify import name_tensors, tensor_paths
from asyncckpt.restore.salvage import salvage_all, salvage_tensors
from asyncckpt.state.apply import LoadPlan
from asyncckpt.state.partial import build_partial

__all__ = ["recover_step"]


def recover_step(committed: CommittedStep) -> Recovered:
    """See `Catalogue.recover`."""
    info: CheckpointInfo | None = None
    try:
        info = committed.info
        keys = LoadPlan(committed.header.tree).keys
        paths = tensor_paths(committed)
    except (CorruptCheckpointError, CheckpointNotFoundError) as error:
        return _recover_arrays(committed, info, error)
    tensors, damaged = salvage_tensors(committed, keys)
    state, contradictions = build_partial(committed.header.tree, tensors)
    if damaged:
        committed.require_unchanged()
    return Recovered(info, state, name_tensors((*damaged, *contradictions), paths))


def _recover_arrays(
    committed: CommittedStep, info: CheckpointInfo | None, error: CorruptCheckpointError | CheckpointNotFoundError
) -> Recovered:
    try:
        tensors, damaged = salvage_all(committed)
    except StorageError as failure:
        if failure.errno not in UNREADABLE:
            raise
        raise error from failure  # the step itself is a link, or its directory is damaged
    if not tensors and not damaged and isinstance(error, CheckpointNotFoundError):
        raise error
    return Recovered(info, dict(tensors), name_tensors((Damage(HEADER, error.message), *damaged), {}))
