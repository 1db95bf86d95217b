"""The package's loggers, behind which a broken handler of the user's cannot do harm.

A handler or filter that raises would otherwise end the thread that hears the writer, and with it every save.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["GuardedLogger", "get_logger"]


class GuardedLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose methods never raise, whatever handlers and filters do."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            # One more frame to skip: the record names the line that logs, not this one.
            super().log(level, msg, *args, stacklevel=kwargs.pop("stacklevel", 1) + 1, **kwargs)
        except Exception:
            self._tell_failure()

    def handle(self, record: logging.LogRecord) -> None:
        """Hand a finished *record* to the logger's filters and handlers."""
        try:
            self.logger.handle(record)
        except Exception:
            self._tell_failure()

    def _tell_failure(self) -> None:
        # As the standard library does for its own handlers: on standard error, if `logging.raiseExceptions`.
        failed = logging.LogRecord(self.logger.name, logging.ERROR, __file__, 0, "a logging handler failed", (), None)
        logging.Handler().handleError(failed)


def get_logger(name: str) -> GuardedLogger:
    """The guarded logger of *name*; configure it as ever, through `logging.getLogger`."""
    return GuardedLogger(logging.getLogger(name))
