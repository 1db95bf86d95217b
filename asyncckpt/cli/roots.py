"""Finding steps in the root that the user named; looking never creates or changes anything."""

from __future__ import annotations

from asyncckpt.errors import CheckpointNotFoundError, NothingCommittedError
from asyncckpt.repository import Catalog, CommittedStep
from asyncckpt.stores import open_store

__all__ = ["find_step", "newest_step", "open_catalog"]

LATEST = "latest"


def open_catalog(root: str) -> Catalog:
    """The catalogue of *root*, which holds a step at least, if perhaps a damaged one.

    Raises:
        NothingCommittedError: nothing is committed there, or there is no such directory.
    """
    try:
        catalog = Catalog(open_store(root))
    except CheckpointNotFoundError as error:
        raise NothingCommittedError(error.message, **error.fields) from error
    if not catalog.steps():
        raise NothingCommittedError(f"nothing is committed in {root}", path=root)
    return catalog


def find_step(catalog: Catalog, which: str) -> CommittedStep:
    """The readable step that *which* names: a number, a tag, or ``latest``.

    Raises:
        CheckpointNotFoundError: no step answers to it.
        CorruptError: that step, or for ``latest`` every step, is damaged.
    """
    try:
        return catalog.find(int(which) if which.isdecimal() else which)
    except CheckpointNotFoundError:
        if which == LATEST and catalog.damaged:
            raise catalog.damaged[0].error from None
        raise


def newest_step(catalog: Catalog) -> CommittedStep:
    """The step of the highest number, which may be damaged."""
    return CommittedStep(catalog.store, catalog.steps()[-1])
