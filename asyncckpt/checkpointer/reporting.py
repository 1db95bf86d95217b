"""Says what is being waited for: a progress bar for who looks at a terminal, log lines for everybody else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

from asyncckpt.checkpointer.backlog import Backlog
from asyncckpt.logs import get_logger

__all__ = ["LogLines", "Reporter", "open_reporter"]

_logger = get_logger("asyncckpt")
LOG_INTERVAL_S = 10.0


class Reporter(Protocol):
    """Shows a backlog, several times a second; used by one thread."""

    def update(self, backlog: Backlog) -> None: ...

    def close(self) -> None: ...


class LogLines:
    """A line in the log every `LOG_INTERVAL_S` seconds, the first one after as many.

    A warning: a process that does not end is what an operator looks for in the log, whatever its level.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()

    def update(self, backlog: Backlog) -> None:
        now = self._clock()
        if now - self._last >= LOG_INTERVAL_S:
            self._last = now
            _logger.warning("still waiting after %.0f s for %s", now - self._started, backlog.describe())

    def close(self) -> None:
        """Nothing is left on the screen."""

    def __repr__(self) -> str:
        return f"<LogLines since {self._clock() - self._started:.0f} s>"


def open_reporter() -> Reporter:
    """What suits the standard error of this process; to be closed."""
    return _progress_bar() if _is_watched() else LogLines()


def _is_watched() -> bool:
    # None in programs without a console, closed where a test or a daemon has closed it.
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        return False
    return is_terminal and find_spec("rich") is not None


def _progress_bar() -> Reporter:
    from asyncckpt.checkpointer.progress_bar import ProgressBar

    return ProgressBar()
