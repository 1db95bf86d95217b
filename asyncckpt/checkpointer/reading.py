"""Reading committed steps without writing: what `Checkpointer` and the module-level functions share."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from asyncckpt.checkpointer.recovering import recover_step
from asyncckpt.errors import CheckpointNotFoundError
from asyncckpt.model import CheckpointInfo, Recovered, VerifyReport
from asyncckpt.policies.keep import Best, rank_best
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.repository.quarantine import open_step_directory
from asyncckpt.repository.verify import verify_step
from asyncckpt.restore.deep import verify_deep
from asyncckpt.restore.reader import read_tensors
from asyncckpt.state.apply import LoadPlan
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

    @property
    def ranking(self) -> Best | None:
        """How ``"best"`` is decided."""
        return self._best

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
        plan = LoadPlan(committed.header.tree, only)
        return plan.build(read_tensors(committed, plan.keys))

    def verify(
        self, which: Which = "latest", *, deep: bool = False, sample: float = 1.0, seed: int = 0
    ) -> VerifyReport:
        """Check sizes and digests of every file of a step. Safe while a run writes to the root.

        Args:
            which: step number, ``"latest"``, ``"best"`` or a tag. ``"latest"`` is the newest with a
                readable header.
            deep: also decode every array and compare its values with what was staged.
            sample: fraction of the bytes to read, in files drawn at random; the others are only looked for.
            seed: of the draw.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint, or it was deleted meanwhile.
            InvalidOptionError: *sample* is not above 0 and at most 1.
            UnsupportedFormatError: written by a newer version.
        """
        committed = CommittedStep(self._store, which) if isinstance(which, int) else self.find(which)
        return (verify_deep if deep else verify_step)(committed, sample=sample, seed=seed)

    def recover(self, which: Which | PathLike[str]) -> Recovered:
        """Salvage what is intact of a damaged step. `load` and `restore` give all of a step or nothing.

        Every value was verified: against the index, or where the index is damaged against the crc32c of
        its chunks. With a damaged header the structure is lost, and arrays come by key with the
        names, types and shapes that their metadata says.

        Args:
            which: step number, ``"latest"`` (the newest there is, readable or not), ``"best"`` or a tag; or,
                as a ``Path``, the directory of a step, such as one that `restore` set aside.

        Raises:
            CheckpointNotFoundError: there is no such step, or nothing is left of it.
            InvalidOptionError: a path that is not the directory of a step.
            UnsupportedFormatError: written by a newer version.
            UnsupportedStateError: it has a type that is not registered, or an enum not imported, here.
        """
        return recover_step(self._present(which))

    def _present(self, which: Which | PathLike[str]) -> CommittedStep:
        """The step *which* names, although its header may be damaged."""
        if isinstance(which, PathLike):
            return open_step_directory(which)
        if isinstance(which, int):
            return CommittedStep(self._store, which)
        steps = Catalog(self._store).steps() if which == "latest" else []
        return CommittedStep(self._store, steps[-1]) if steps else self.find(which)

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
