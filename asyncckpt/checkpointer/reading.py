"""Reading committed steps without writing: what `Checkpointer` and the module-level functions share."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from asyncckpt.errors import CheckpointNotFoundError
from asyncckpt.model import CheckpointInfo, VerifyReport
from asyncckpt.policies.keep import Best, rank_best
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.repository.verify import verify_step
from asyncckpt.restore.reader import read_tensors
from asyncckpt.state.apply import build_state, select_keys
from asyncckpt.stores import open_store
from asyncckpt.stores.contract import Store

__all__ = ["Catalogue", "Which", "load", "open"]

Which = int | str
"""A step number, ``"latest"``, ``"best"`` or a tag."""


class Catalogue:
    """Read-only view of the committed checkpoints of one root. Takes no lock, sees what is there now.

    Args:
        store: the root.
        best: how ``"best"`` is decided; None knows no best.
    """

    def __init__(self, store: Store, best: Best | None = None) -> None:
        self._store = store
        self._best = best

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every committed checkpoint, oldest first; steps with an unreadable header are left out."""
        return [committed.info for committed in reversed(Catalog(self._store).committed())]

    @property
    def latest(self) -> CheckpointInfo | None:
        """The committed checkpoint of the highest step."""
        try:
            return Catalog(self._store).find("latest").info
        except CheckpointNotFoundError:
            return None

    @property
    def best(self) -> CheckpointInfo | None:
        """The committed checkpoint with the best metric; None without one."""
        ranked = rank_best(self.checkpoints(), self._best) if self._best is not None else []
        return ranked[0] if ranked else None

    def find(self, which: Which) -> CommittedStep:
        """The committed step *which* names.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: the header of the numbered step is damaged.
        """
        if which == "best":
            best = self.best
            if best is None:
                raise CheckpointNotFoundError(
                    "no committed checkpoint is the best: give Keep(best=...) and metrics to save()", which=which
                )
            which = best.step
        return Catalog(self._store).find(which)

    def load(self, which: Which = "latest", *, only: str | Sequence[str] | None = None) -> dict[str, Any]:
        """The state as fresh CPU tensors and plain values, without live objects to put them into.

        Args:
            which: step number, ``"latest"``, ``"best"`` or a tag.
            only: glob patterns over ``/``-joined paths, such as ``"model/*"``.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
            CorruptCheckpointError: a file it needs is damaged.
            InvalidOptionError: a pattern matches nothing.
        """
        committed = self.find(which)
        tree = committed.header.tree
        return build_state(tree, read_tensors(committed, select_keys(tree, only)), only)

    def verify(self, which: Which = "latest") -> VerifyReport:
        """Check sizes and digests of every file of a step.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
        """
        return verify_step(self.find(which))

    def __repr__(self) -> str:
        return f"<Catalogue {self._store.location('')}>"


def open(root: str | PathLike[str], *, best: Best | None = None) -> Catalogue:
    """A read-only catalogue of the checkpoints in *root*; safe while a run writes to it.

    Args:
        root: directory of the run.
        best: how ``"best"`` is decided.

    Raises:
        CheckpointNotFoundError: *root* does not exist.
    """
    return Catalogue(open_store(root), best)


def load(
    root: str | PathLike[str], which: Which = "latest", *, only: str | Sequence[str] | None = None
) -> dict[str, Any]:
    """The state of one checkpoint; see `Catalogue.load`."""
    return open(root).load(which, only=only)
