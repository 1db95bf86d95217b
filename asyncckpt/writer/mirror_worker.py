"""What is done to a mirror, one call after the other, in a thread that may wait for its disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from datetime import UTC, datetime

from asyncckpt.errors import CheckpointNotFoundError, CorruptError, StorageError
from asyncckpt.logs import get_logger
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies.keep import Keep
from asyncckpt.policies.mirror import Mirror
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.copying import CopyStats, copy_step
from asyncckpt.repository.mirror import MirrorRoot, open_mirror, plan_mirror
from asyncckpt.repository.retention import Decision
from asyncckpt.stores.contract import Store
from asyncckpt.writer.known import KnownSteps
from asyncckpt.writer.pruning import Pruner

__all__ = ["MirrorPlan", "MirrorWorker"]

_logger = get_logger("asyncckpt.writer")


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """How the two roots compare.

    Attributes:
        missing: what to copy, newest first.
        newest: the newest step on the mirror.
        present: nonces of all steps of the first root.
    """

    missing: tuple[CheckpointInfo, ...]
    newest: int | None
    present: frozenset[str]


@dataclass(frozen=True, slots=True)
class _OpenMirror:
    """The mirror while it works."""

    root: MirrorRoot
    known: KnownSteps
    pruner: Pruner


class MirrorWorker:
    """Opens, compares, copies and prunes; used by one thread at a time.

    After an error call `close`: the next call opens the mirror anew, and clears what the failure left.

    Args:
        source: the first root.
        options: the mirror.
        pace: see `repository.copying.copy_step`.
        incremental: link what did not change since another step on the mirror, where its file system can.
    """

    def __init__(self, source: Store, options: Mirror, pace: Callable[[], None], *, incremental: bool) -> None:
        self._source = source
        self._options = options
        self._keep = options.keep or Keep()
        self._pace = pace
        self._incremental = incremental
        self._known = KnownSteps(source)
        self._mirror: _OpenMirror | None = None
        self._was_open = False
        self._attempts: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"MirrorWorker({self._options!r}, open={self._mirror is not None})"

    def plan(self, rewritten: Iterable[int], refused: Set[str]) -> MirrorPlan:
        """Compare the roots.

        Args:
            rewritten: numbers that were committed since the last plan.
            refused: nonces of steps that cannot be copied.

        Raises:
            CheckpointError: as `repository.mirror.open_mirror`, or one of the roots cannot be read.
        """
        mirrored = self._open().known.refresh()
        for step in rewritten:
            self._known.forget(step)
        present = self._known.refresh()
        source = [info for info in present if info.nonce not in refused]
        return MirrorPlan(
            tuple(plan_mirror(source, mirrored, self._keep, datetime.now(UTC))),
            max((info.step for info in mirrored), default=None),
            frozenset(info.nonce for info in present),
        )

    def copy(self, info: CheckpointInfo) -> CopyStats:
        """Copy one step; raises what `repository.copying.copy_step` does."""
        mirror = self._open()
        attempt = self._attempts.get(info.nonce, 0)
        self._attempts[info.nonce] = attempt + 1
        others = [known.step for known in mirror.known.refresh() if known.step != info.step]
        link_to = CommittedStep(mirror.root.store, max(others)) if others and self._incremental else None
        source = CommittedStep(self._source, info.step)
        stats = copy_step(source, mirror.root.store, self._pace, attempt=attempt, link_to=link_to)
        del self._attempts[info.nonce]
        mirror.known.forget(info.step)
        mirror.pruner.forget(info.step)
        return stats

    def prune(self) -> tuple[list[Decision], StorageError | None]:
        """Apply the retention of the mirror; see `pruning.Pruner.run`."""
        return self._open().pruner.run(datetime.now(UTC))

    def delete(self, step: int, nonce: str) -> bool:
        """Delete one step of the mirror, if it is that checkpoint; whether it was."""
        committed = CommittedStep(self._open().root.store, step)
        try:
            if committed.header.nonce != nonce:
                return False
            committed.delete()
        except (CheckpointNotFoundError, CorruptError):
            return False
        return True

    def close(self) -> None:
        """Let go of the mirror, until it is needed again; forget what was read."""
        self._known = KnownSteps(self._source)
        if self._mirror is not None:
            self._mirror.root.close()
            self._mirror = None

    def _open(self) -> _OpenMirror:
        if self._mirror is None:
            options = self._options
            root = open_mirror(self._source, options.root, options.mount, may_create=not self._was_open)
            if root.is_on_same_disk and not self._was_open:
                _logger.warning(
                    "the mirror %s is on the same file system as the root %s: it survives damaged and deleted "
                    "checkpoints, not the disk (or its own disk is not mounted)",
                    options.root,
                    self._source.location(""),
                )
            self._was_open = True
            self._mirror = _OpenMirror(root, KnownSteps(root.store), Pruner(root.store, self._keep))
        return self._mirror
