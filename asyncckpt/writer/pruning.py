"""Retention after each commit."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from datetime import datetime

from asyncckpt.errors import StorageError
from asyncckpt.policies.keep import Keep
from asyncckpt.repository.catalog import Catalog
from asyncckpt.repository.retention import Decision, execute_retention, plan_retention
from asyncckpt.stores.contract import Store
from asyncckpt.writer.known import KnownSteps

__all__ = ["Pruner"]


class Pruner:
    """Applies one retention policy to one root, over and over.

    Args:
        store: the root.
        keep: the policy.
    """

    def __init__(self, store: Store, keep: Keep) -> None:
        self._store = store
        self._keep = keep
        self._known = KnownSteps(store)

    def __repr__(self) -> str:
        return f"Pruner({self._keep!r}, {self._known!r})"

    def forget(self, step: int) -> None:
        """*step* was written anew."""
        self._known.forget(step)

    def run(self, now: datetime, in_use: Set[int] = frozenset()) -> tuple[list[Decision], StorageError | None]:
        """Remove what the policy does not keep.

        Args:
            now: current time, with a time zone.
            in_use: steps that somebody is still reading; they stay until the next time.

        Returns:
            What was removed and why, and what kept the rest from being removed.

        Raises:
            StorageError: the root cannot be read.
        """
        plan = plan_retention(self._known.refresh(), self._keep, now)
        plan = replace(plan, remove=tuple(decision for decision in plan.remove if decision.step not in in_use))
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
