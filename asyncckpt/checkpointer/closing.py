"""The ways out: leaving a block, and the end of the interpreter."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

from asyncckpt.errors import CheckpointError
from asyncckpt.logs import get_logger

__all__ = ["Closeable", "close_at_exit", "quiet_if"]

_logger = get_logger("asyncckpt")


class Closeable(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def quiet_if(error: BaseException | None) -> Iterator[None]:
    """Do not let a failed save hide the exception that is already leaving the block."""
    try:
        yield
    except CheckpointError as failure:
        if error is None:
            raise
        _logger.error("a checkpoint was lost: %s", failure)


def close_at_exit(checkpointer: Closeable) -> Callable[[], None]:
    """Close *checkpointer* when the interpreter ends, unless it is gone by then; what to unregister from `atexit`."""
    reference = weakref.ref(checkpointer)
    owner = os.getpid()

    def close() -> None:
        found = reference()
        if found is not None and os.getpid() == owner:
            found.close()

    atexit.register(close)
    return close
