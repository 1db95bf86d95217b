"""Retention after each commit, with the headers of known steps kept in memory."""

from __future__ import annotations

from datetime import datetime

from asyncckpt.errors import CheckpointNotFoundError, CorruptError
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

    def run(self, now: datetime) -> list[Decision]:
        """Remove what the policy does not keep; returns what was removed and why.

        Raises:
            StorageError: something could not be removed; the rest was.
        """
        self._refresh()
        plan = plan_retention(list(self._known.values()), self._keep, now)
        execute_retention(self._store, plan)
        for decision in plan.remove:
            self.forget(decision.step)
        return list(plan.remove)

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
