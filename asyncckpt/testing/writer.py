"""The death of a writer, for chaos tests of whole training loops."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from asyncckpt.errors import InvalidOptionError

if TYPE_CHECKING:
    from asyncckpt.checkpointer import Checkpointer

__all__ = ["kill_writer"]


def kill_writer(checkpointer: Checkpointer) -> int:
    """Kill the writer process of *checkpointer* (SIGKILL), in the middle of whatever it does.

    What was staged is still in the trainer's memory: a new writer is started and writes it again, up to
    ``Writer(restarts=...)`` times; beyond that, saves fail with `WriterDiedError`.

    Returns:
        The process that was killed.

    Raises:
        InvalidOptionError: the writer is a thread of this process.
        ProcessLookupError: it has died already, and nobody has noticed yet.
    """
    pid = checkpointer.health().writer_pid
    if pid == os.getpid():
        raise InvalidOptionError("the writer is a thread of this process and cannot be killed alone")
    os.kill(pid, signal.SIGKILL)
    return pid
