"""Restores a committed step into live state: choose, compare, read, and only then change anything.

With a mirror there are two places to choose from. The first root goes first; the mirror has what is damaged or
lost there. A step of the mirror with the number of a step of the first root is the same checkpoint only if it
has the same nonce: else it is one that the run has replaced, and is not offered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyncckpt.checkpointer.reading import Catalogue, Which
from asyncckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    CorruptError,
    NonFiniteError,
    StorageError,
    UnsupportedFormatError,
)
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies.keep import Best, rank_best
from asyncckpt.repository.catalog import ABSENT, UNREADABLE, Catalog, CommittedStep
from asyncckpt.repository.quarantine import quarantine_step
from asyncckpt.restore.reader import read_tensors
from asyncckpt.restore.scratch import Memory
from asyncckpt.state.apply import plan_apply
from asyncckpt.stores.contract import Store

__all__ = ["RestoreTarget", "restore_in_place"]


@dataclass(frozen=True, slots=True)
class RestoreTarget:
    """What to restore into, and how; see `Checkpointer.restore`. *memory* is what tensors are decoded into first."""

    state: Mapping[str, Any]
    memory: Memory
    only: str | Sequence[str] | None = None
    strict: bool = True
    finite: bool = False

    def load(self, committed: CommittedStep) -> CheckpointInfo:
        """Restore *committed*: all of it, or nothing is changed."""
        if self.finite and committed.info.finite is False:
            raise NonFiniteError(f"step {committed.step} holds NaN or infinity", step=committed.step)
        plan = plan_apply(self.state, committed.header.tree, self.only, self.strict)
        plan.execute(read_tensors(committed, plan.keys, memory=self.memory))
        return replace(committed.info, mismatch=plan.mismatch)


@dataclass(slots=True)
class _Root:
    """What one root offers: readable steps, newest first, and why the others are not."""

    store: Store
    readable: list[CommittedStep] = field(default_factory=list)
    damaged: dict[int, CorruptError] = field(default_factory=dict)

    @property
    def nonces(self) -> dict[int, str]:
        return {committed.step: committed.header.nonce for committed in self.readable}


def restore_in_place(
    store: Store, catalogue: Catalogue, which: Which, target: RestoreTarget, mirror: Store | None = None
) -> CheckpointInfo | None:
    """See `Checkpointer.restore`. The caller holds the lock of *store*; *mirror* is only read."""
    if mirror is None and which != "latest":
        return target.load(catalogue.find(which))
    first = _look(store, may_be_lost=mirror is not None)
    second = None if mirror is None else _look(mirror, may_be_lost=True)
    if which == "latest":
        return _restore_latest(first, second, target)
    assert second is not None
    return _restore_named(first, second, catalogue, which, target)


def _look(store: Store, *, may_be_lost: bool) -> _Root:
    catalog = Catalog(store)
    try:
        readable = catalog.committed()
    except StorageError as error:
        # Anything else says nothing about the checkpoints; falling back could lose the newest in silence.
        if not may_be_lost or error.errno not in ABSENT | UNREADABLE:
            raise
        warnings.warn(f"{store.location('')} cannot be read: {error}", RuntimeWarning, stacklevel=5)
        return _Root(store)
    return _Root(store, readable, {found.step: found.error for found in catalog.damaged})


def _restore_latest(first: _Root, second: _Root | None, target: RestoreTarget) -> CheckpointInfo | None:
    _refuse_newer_format(first.damaged)
    if second is not None:
        whole = first.nonces
        _refuse_newer_format({step: error for step, error in second.damaged.items() if step not in whole})
    for committed, root in _newest_first(first, second):
        try:
            found = target.load(committed)
        except CorruptError as error:
            root.damaged[committed.step] = error
            continue
        except CheckpointNotFoundError:
            if root is first:
                raise
            continue  # the mirror is being written to
        is_lost_here = root is not first
        skipped = sorted(
            (step for step in first.damaged if step > found.step or (is_lost_here and step == found.step)), reverse=True
        )
        _set_aside(first.store, skipped, first.damaged, found.step)
        found = replace(found, fell_back_from=tuple(skipped))
        return _from_mirror(found, first.store, None) if is_lost_here else found
    _raise_if_damaged(first, second)
    return None


def _newest_first(first: _Root, second: _Root | None) -> Iterator[tuple[CommittedStep, _Root]]:
    """What to try, in this order."""
    nonces = first.nonces
    offers = [(committed, first) for committed in first.readable]
    if second is not None:
        offers += [
            (committed, second)
            for committed in second.readable
            if nonces.get(committed.step) in (None, committed.header.nonce)
        ]
    # Sorting is stable: of two copies that of the first root goes first.
    yield from sorted(offers, key=lambda offer: offer[0].step, reverse=True)


def _restore_named(
    first: _Root, second: _Root, catalogue: Catalogue, which: Which, target: RestoreTarget
) -> CheckpointInfo:
    step = _resolve(first, second, catalogue.ranking, which)
    try:
        return target.load(catalogue.find(which if step is None else step))
    except CheckpointError as error:
        copies = [committed for committed in second.readable if committed.step == step]
        is_same = bool(copies) and first.nonces.get(copies[0].step) in (None, copies[0].header.nonce)
        if not is_same or not _is_lost(error):
            raise
        failure = error
    try:
        return _from_mirror(target.load(copies[0]), first.store, failure)
    except (CorruptError, CheckpointNotFoundError) as error:
        raise failure from error


def _is_lost(error: CheckpointError) -> bool:
    """Whether *error* says that a checkpoint is not there, or not whole."""
    if isinstance(error, StorageError):
        return error.errno in ABSENT | UNREADABLE
    return isinstance(error, (CheckpointNotFoundError, CorruptCheckpointError))


def _resolve(first: _Root, second: _Root, best: Best | None, which: Which) -> int | None:
    """The step that *which* names in both roots together; None for none."""
    if isinstance(which, int):
        return which
    infos = [committed.info for committed, _ in _newest_first(first, second)]
    if which == "best":
        infos = [] if best is None else rank_best(infos, best)
    else:
        infos = [info for info in infos if which in info.tags]
    return infos[0].step if infos else None


def _from_mirror(found: CheckpointInfo, store: Store, failure: CheckpointError | None) -> CheckpointInfo:
    reason = f": {failure}" if failure is not None else ", which does not have it whole"
    warnings.warn(
        f"restored step {found.step} from the mirror at {found.path}, not from {store.location('')}{reason}",
        RuntimeWarning,
        stacklevel=5,
    )
    return replace(found, from_mirror=True)


def _raise_if_damaged(first: _Root, second: _Root | None) -> None:
    damaged = {**(second.damaged if second is not None else {}), **first.damaged}
    if not damaged:
        return
    newest = max(damaged)
    places = first.store.location("") if second is None else f"{first.store.location('')} and its mirror"
    if all(isinstance(error, NonFiniteError) for error in damaged.values()):
        raise NonFiniteError(f"every checkpoint in {places} holds NaN or infinity", steps=sorted(damaged))
    raise CorruptCheckpointError(
        f"every checkpoint in {places} is damaged; the newest: {damaged[newest]}", steps=sorted(damaged)
    ) from damaged[newest]


def _refuse_newer_format(damaged: Mapping[int, CorruptError]) -> None:
    # A checkpoint of a newer asyncckpt is whole. Falling back would silently lose its training.
    for error in damaged.values():
        if isinstance(error, UnsupportedFormatError):
            raise error


def _set_aside(store: Store, steps: Sequence[int], damaged: Mapping[int, CorruptError], found: int) -> None:
    for step in steps:
        where = quarantine_step(store, step)
        what = "is not finite" if isinstance(damaged[step], NonFiniteError) else "is damaged"
        warnings.warn(
            f"step {step} {what} and was set aside at {where}; restored step {found} instead: {damaged[step]}",
            RuntimeWarning,
            stacklevel=5,
        )
