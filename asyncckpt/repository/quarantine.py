"""Moves a damaged step out of the way, so that its number can be saved again."""

from __future__ import annotations

import uuid

from asyncckpt.format.paths import step_name
from asyncckpt.repository.names import OWN
from asyncckpt.stores.contract import Store

__all__ = ["DAMAGED", "quarantine_step"]

DAMAGED = f"{OWN}/damaged"


def quarantine_step(store: Store, step: int) -> str:
    """Move *step* to ``.asyncckpt/damaged``; nothing of it is deleted. The caller holds the root's lock.

    Training that fell back to an older step reaches the damaged one's number again and must be able
    to save it; what is left of the damaged one may still be worth salvaging by hand.

    Returns:
        Where it is now, for people.

    Raises:
        StorageError: it cannot be moved.
    """
    target = f"{DAMAGED}/{step_name(step)}-{uuid.uuid4().hex}"
    store.open_barrier(DAMAGED).close()
    store.sync_directory(OWN)  # before anything is moved to a directory that a power cut could still take away
    store.rename(step_name(step), target)
    store.sync_directory(DAMAGED)
    store.sync_directory("")
    return store.location(target)
