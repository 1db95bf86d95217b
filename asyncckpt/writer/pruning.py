"""Retention after each commit, with the headers of known steps kept in memory."""

from __future__ import annotations

from datetime import datetime

from asyncckpt.errors import CheckpointNotFoundError, CorruptError, StorageError
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies.keep import Keep
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.repository.retention import Decision, execute_retention, plan_retention
from asyncckpt.stores.contract import Store

__all__ = ["Pruner"]


class Pruner:
    """Applies one retention policy to one root, over and over.

    A run that keeps thousands of steps must not read thousands of headers after every save; only
    those of new steps are read. Steps are immutable, so what was read stays true until the number is
    written again, which `forget` announces.

    Args:
        store: the root.
        keep: the policy.
    """

    def __init__(self, store: Store, keep: Keep) -> None:
        self._store = store
        self._keep = keep
        self._known: dict[int, CheckpointInfo] = {}

    def forget(self, step: int) -> None:
        """*step* was written anew."""
        self._known.pop(step, None)

    def run(self, now: datetime) -> tuple[list[Decision], StorageError | None]:
        """Remove what the policy does not keep.

        Returns:
            What was removed and why, and what kept the rest from being removed.

        Raises:
            StorageError: the root cannot be read.
        """
        self._refresh()
        plan = plan_retention(list(self._known.values()), self._keep, now)
        failure: StorageError | None = None
        try:
            execute_retention(self._store, plan)
        except StorageError as error:
            failure = error
        present = set(Catalog(self._store).steps()) if failure is not None else frozenset()
        removed = [decision for decision in plan.remove if decision.step not in present]
        for decision in removed:
            self.forget(decision.step)
        return removed, failure

    def _refresh(self) -> None:
        present = Catalog(self._store).steps()
        known = {step: self._known[step] for step in present if step in self._known}
        for step in present:
            if step not in known:
                try:
                    known[step] = CommittedStep(self._store, step).info
                except (CorruptError, CheckpointNotFoundError):
                    continue  # damaged steps neither count nor get removed
        self._known = known
