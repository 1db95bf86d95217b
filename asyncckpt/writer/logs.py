"""The log of the writer process, kept until it can be told to the trainer.

Not written to the inherited standard error: a pipe there that nobody reads would block the writer, and
with it every save, in the middle of a sentence.
"""

from __future__ import annotations

import logging
from collections import deque

from asyncckpt.writer.messages import LogRecord

__all__ = ["LogBuffer"]

_MAX_RECORDS = 1000


class LogBuffer(logging.Handler):
    """Collects what the package logs, from any thread; the oldest is forgotten when nobody takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[LogRecord] = deque(maxlen=_MAX_RECORDS)

    def install(self, level: int) -> None:
        """Take over the package's logger in this process, from *level* on."""
        logger = logging.getLogger("asyncckpt")
        logger.handlers[:] = [self]
        logger.propagate = False
        logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._records.append(LogRecord(record.levelno, self.format(record)))
        except Exception:  # what cannot be formatted is not worth a save
            self.handleError(record)

    def take(self) -> list[LogRecord]:
        """Everything since the last call, oldest first."""
        taken: list[LogRecord] = []
        while self._records:
            taken.append(self._records.popleft())
        return taken
