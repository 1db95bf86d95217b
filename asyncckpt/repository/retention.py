"""Which committed checkpoints to remove: first a pure plan with a reason per step, then the deed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from asyncckpt.errors import CheckpointNotFoundError, StorageError
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies.keep import Keep, rank_best
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.commit import sync_renames
from asyncckpt.stores.contract import Store

__all__ = ["Decision", "RetentionPlan", "execute_retention", "plan_retention"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one step, and why."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """Every committed step is in exactly one of the two, newest first."""

    keep: tuple[Decision, ...] = ()
    remove: tuple[Decision, ...] = ()


def plan_retention(committed: Sequence[CheckpointInfo], keep: Keep, now: datetime) -> RetentionPlan:
    """Decide about every committed step.

    Applying the plan and planning again removes nothing more: each rule picks the same steps from
    what is left.

    Args:
        committed: all committed steps, in any order. Damaged ones are not among them: they neither
            count nor get removed.
        keep: the rules.
        now: current time, with a time zone; only used to say how old a removed step is.
    """
    newest_first = sorted(committed, key=lambda info: info.step, reverse=True)
    reasons: dict[int, list[str]] = {info.step: [] for info in newest_first}
    for step, reason in _reasons(newest_first, keep):
        reasons[step].append(reason)
    return RetentionPlan(
        keep=tuple(Decision(step, ", ".join(why)) for step, why in reasons.items() if why),
        remove=tuple(
            Decision(info.step, f"no rule keeps it; {_kind(info)}{_age(info, now)} old")
            for info in newest_first
            if not reasons[info.step]
        ),
    )


def _reasons(newest_first: Sequence[CheckpointInfo], keep: Keep) -> Iterable[tuple[int, str]]:
    last = len(newest_first) if keep.last is None else keep.last
    for position, info in enumerate(newest_first[:last]):
        yield info.step, "newest" if position == 0 else "everything is kept" if keep.last is None else f"last {last}"
    # A run that restored an older step saves below the newest one. What it saved must not go at once.
    newest = {info.step for info in newest_first[:last]}
    latest_first = sorted(newest_first, key=lambda info: (_created_s(info), info.step), reverse=True)
    for info in latest_first[:last]:
        if info.step not in newest:
            yield info.step, f"last {last} saved"
    for info in newest_first:
        protecting = info.tags if keep.tags is None else [tag for tag in info.tags if tag in keep.tags]
        if protecting:
            yield info.step, f"tagged {', '.join(protecting)}"
        if info.kind in keep.kinds:
            yield info.step, f"kind {info.kind}"
    if keep.best is not None:
        for rank, info in enumerate(rank_best(newest_first, keep.best)[: keep.best.n], start=1):
            yield info.step, f"best {rank} by {keep.best.metric}"
    every_steps, every_seconds = keep.every_steps, keep.every_seconds
    if every_steps is not None:
        for info in _first_of_each(newest_first, lambda info: info.step // every_steps):
            yield info.step, f"every {every_steps} steps"
    if every_seconds is not None:
        # Periods are counted from the epoch, so that they do not move from one plan to the next.
        for info in _first_of_each(newest_first, lambda info: _created_s(info) // every_seconds):
            yield info.step, f"every {every_seconds:g} s"


def _first_of_each(
    newest_first: Sequence[CheckpointInfo], period: Callable[[CheckpointInfo], float]
) -> Iterable[CheckpointInfo]:
    # The first, not the last: it stays the first, whatever is saved later in the same period.
    return {period(info): info for info in newest_first}.values()


def _created_s(info: CheckpointInfo) -> float:
    # Our headers say UTC explicitly; one that says nothing means the same, wherever it is read.
    created = info.created if info.created.tzinfo else info.created.replace(tzinfo=UTC)
    return created.timestamp()


def _kind(info: CheckpointInfo) -> str:
    return "" if info.kind == "regular" else f"{info.kind}, "


def _age(info: CheckpointInfo, now: datetime) -> str:
    seconds = max(now.timestamp() - _created_s(info), 0.0)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def execute_retention(store: Store, plan: RetentionPlan) -> list[int]:
    """Remove what *plan* says, oldest first; a step that is gone already is no error.

    A step that cannot be removed does not keep the others from being removed.

    Returns:
        The steps that were removed.

    Raises:
        StorageError: the first failure, after all others were tried; or the steps to keep cannot be
            made durable, and nothing was removed.
    """
    if plan.remove:
        # The newest step may be one that a killed writer had renamed and not yet flushed. Nothing
        # acknowledged may be removed on the strength of a step that a power cut could take away.
        sync_renames(store)
    removed: list[int] = []
    failures: list[StorageError] = []
    for decision in reversed(plan.remove):
        try:
            CommittedStep(store, decision.step).delete()
            removed.append(decision.step)
        except CheckpointNotFoundError:
            continue
        except StorageError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return removed
