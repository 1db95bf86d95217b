"""Saves that have not reached the writer yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import asyncckpt as ac

__all__ = ["hand_overs_held"]

_TIMEOUT_S = 60


@contextmanager
def hand_overs_held(ckpt: ac.Checkpointer) -> Iterator[None]:
    """No save is handed over to the writer in the block; after it, those from within have been, or were dropped."""
    entered, leave, caught_up = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert leave.wait(_TIMEOUT_S)

    hand_overs = ckpt._saves._hand_overs
    hand_overs.put(block)
    assert entered.wait(_TIMEOUT_S)
    try:
        yield
    finally:
        hand_overs.put(caught_up.set)
        leave.set()
    assert caught_up.wait(_TIMEOUT_S)
