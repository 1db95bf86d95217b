"""Restores a committed step into live state: choose, compare, read, and only then change anything."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncckpt.checkpointer.reading import Catalogue, Which
from asyncckpt.errors import CorruptCheckpointError, CorruptError, UnsupportedFormatError
from asyncckpt.model import CheckpointInfo
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.repository.quarantine import quarantine_step
from asyncckpt.restore.reader import read_tensors
from asyncckpt.state.apply import plan_apply
from asyncckpt.stores.contract import Store

__all__ = ["restore_in_place"]


def restore_in_place(
    store: Store,
    catalogue: Catalogue,
    which: Which,
    state: Mapping[str, Any],
    only: str | Sequence[str] | None,
    strict: bool,
) -> CheckpointInfo | None:
    """See `Checkpointer.restore`. The caller holds the root's lock."""
    if which != "latest":
        return _restore_step(catalogue.find(which), state, only, strict)
    catalog = Catalog(store)
    readable = catalog.committed()
    damaged = {found.step: found.error for found in catalog.damaged}
    _refuse_newer_format(damaged)
    for committed in readable:
        try:
            found = _restore_step(committed, state, only, strict)
        except CorruptError as error:
            damaged[committed.step] = error
            continue
        skipped = sorted((step for step in damaged if step > found.step), reverse=True)
        _set_aside(store, skipped, damaged, found.step)
        return replace(found, fell_back_from=tuple(skipped))
    if damaged:
        newest = max(damaged)
        raise CorruptCheckpointError(
            f"every checkpoint in {store.location('')} is damaged; the newest: {damaged[newest]}",
            steps=sorted(damaged),
        ) from damaged[newest]
    return None


def _refuse_newer_format(damaged: Mapping[int, CorruptError]) -> None:
    # A checkpoint of a newer asyncckpt is whole. Falling back would silently lose its training.
    for error in damaged.values():
        if isinstance(error, UnsupportedFormatError):
            raise error


def _restore_step(
    committed: CommittedStep, state: Mapping[str, Any], only: str | Sequence[str] | None, strict: bool
) -> CheckpointInfo:
    plan = plan_apply(state, committed.header.tree, only, strict)
    plan.execute(read_tensors(committed, plan.keys))
    return replace(committed.info, mismatch=plan.mismatch)


def _set_aside(store: Store, steps: Sequence[int], damaged: Mapping[int, CorruptError], found: int) -> None:
    for step in steps:
        where = quarantine_step(store, step)
        warnings.warn(
            f"step {step} is damaged and was set aside at {where}; restored step {found} instead: {damaged[step]}",
            RuntimeWarning,
            stacklevel=4,
        )
