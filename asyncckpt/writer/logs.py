"""The log of the writer process, kept until it can be told to the trainer, and how the trainer takes it in.

Not written to the inherited standard error: a pipe there that nobody reads would block the writer, and
with it every save, in the middle of a sentence.

The trainer's logging configuration decides what becomes of a record: it is handled there by the logger of the
same name. What no logger there would take is not even sent; the writer hears of a changed level with the next save.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from asyncckpt.logs import get_logger
from asyncckpt.writer.messages import LogRecord

__all__ = ["LogBuffer", "hand_on", "wanted_level"]

_MAX_RECORDS = 1000
_MAX_CHARACTERS = 10_000
_NAMES = ("asyncckpt", "asyncckpt.writer", "asyncckpt.repository")


def wanted_level() -> int:
    """The lowest level that one of the loggers the writer uses would take in this process."""
    return min(logging.getLogger(name).getEffectiveLevel() for name in _NAMES)


def hand_on(record: LogRecord, pid: int) -> None:
    """Log what the writer *pid* logged, in this process; never raises."""
    logger = logging.getLogger(record.logger)
    if not logger.isEnabledFor(record.level):
        return
    known = logging.LogRecord(record.logger, record.level, "(writer)", 0, record.message, None, None)
    known.created, known.msecs = record.created, int(record.created % 1 * 1000)
    known.process, known.processName, known.threadName = pid, "asyncckpt-writer", "asyncckpt-writer"
    get_logger(record.logger).handle(known)


class LogBuffer(logging.Handler):
    """Collects what the package logs, from any thread; the oldest is forgotten when nobody takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[LogRecord] = deque(maxlen=_MAX_RECORDS)
        self._num_forgotten = 0
        self._counting = threading.Lock()

    def install(self, level: int) -> None:
        """Take over the package's logger in this process, from *level* on."""
        logger = logging.getLogger("asyncckpt")
        logger.handlers[:] = [self]
        logger.propagate = False
        logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
        except Exception:  # what cannot be formatted is not worth a save
            self.handleError(record)
            return
        if len(message) > _MAX_CHARACTERS:
            message = f"{message[:_MAX_CHARACTERS]}... ({len(message)} characters)"
        with self._counting:
            self._num_forgotten += len(self._records) == _MAX_RECORDS
            self._records.append(LogRecord(record.levelno, message, record.name, record.created))

    def take(self) -> list[LogRecord]:
        """Everything since the last call, oldest first."""
        with self._counting:
            taken = list(self._records)
            self._records.clear()
            forgotten, self._num_forgotten = self._num_forgotten, 0
        if forgotten:
            message = f"{forgotten} messages of the writer before this one were too many to be kept"
            taken.insert(0, LogRecord(logging.WARNING, message, "asyncckpt.writer", taken[0].created))
        return taken
