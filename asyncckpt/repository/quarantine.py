"""Moves a damaged step out of the way, so that its number can be saved again; and finds it there."""

from __future__ import annotations

import os
import re
import uuid

from asyncckpt.errors import InvalidOptionError
from asyncckpt.format.paths import step_name
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.names import OWN
from asyncckpt.stores import open_store
from asyncckpt.stores.contract import Store

__all__ = ["DAMAGED", "move_aside", "open_step_directory", "quarantine_step"]

DAMAGED = f"{OWN}/damaged"
_STEP_DIRECTORY = re.compile(r"step-(\d{8,18})(-.*)?\Z", re.ASCII)


def quarantine_step(store: Store, step: int) -> str:
    """Move *step* to ``.asyncckpt/damaged``; nothing of it is deleted. The caller holds the root's lock.

    Training that fell back to an older step reaches the damaged one's number again and must be able
    to save it; what is left of the damaged one may still be worth salvaging by hand.

    Returns:
        Where it is now, for people.

    Raises:
        StorageError: it cannot be moved.
    """
    return store.location(move_aside(store, step))


def move_aside(store: Store, step: int) -> str:
    """`quarantine_step`; returns the key it has now."""
    target = f"{DAMAGED}/{step_name(step)}-{uuid.uuid4().hex}"
    store.open_barrier(DAMAGED).close()
    store.sync_directory(OWN)  # before anything is moved to a directory that a power cut could still take away
    store.rename(step_name(step), target)
    store.sync_directory(DAMAGED)
    store.sync_directory("")
    return target


def open_step_directory(path: str | os.PathLike[str]) -> CommittedStep:
    """The step in the directory *path*, ``.../step-00000500`` or as `quarantine_step` called it.

    Raises:
        InvalidOptionError: it is not called like a step.
        CheckpointNotFoundError: the directory above it does not exist.
    """
    parent, name = os.path.split(os.path.abspath(path))
    match = _STEP_DIRECTORY.match(name)
    if match is None:
        raise InvalidOptionError(f"{os.fspath(path)} is not the directory of a step", path=os.fspath(path))
    return CommittedStep(open_store(parent), int(match[1]), name)
