"""What is committed in a root that is looked at over and over."""

from __future__ import annotations

from asyncckpt.errors import CheckpointNotFoundError, CorruptError
from asyncckpt.model import CheckpointInfo
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.stores.contract import Store

__all__ = ["KnownSteps"]


class KnownSteps:
    """The committed steps of one root, with the headers of known ones kept in memory.

    A run that keeps thousands of steps must not read thousands of headers after every save; only
    those of new steps are read. Steps are immutable, so what was read stays true until the number is
    written again, which `forget` announces.

    Args:
        store: the root.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, CheckpointInfo] = {}

    def __repr__(self) -> str:
        return f"KnownSteps({len(self._known)} at {self._store.url})"

    def forget(self, step: int) -> None:
        """*step* was removed, or written anew."""
        self._known.pop(step, None)

    def refresh(self) -> list[CheckpointInfo]:
        """All that are readable now; damaged ones neither count nor get removed.

        Raises:
            StorageError: the root cannot be read.
        """
        present = Catalog(self._store).steps()
        known = {step: self._known[step] for step in present if step in self._known}
        for step in present:
            if step not in known:
                try:
                    known[step] = CommittedStep(self._store, step).info
                except (CorruptError, CheckpointNotFoundError):
                    continue
        self._known = known
        return list(known.values())
