"""A progress bar for each save that is waited for. Needs rich, the extra ``[cli]``; imported when it is shown."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from asyncckpt.checkpointer.backlog import Backlog
from asyncckpt.telemetry.units import format_bytes, format_seconds

__all__ = ["ProgressBar"]

_PATIENCE_S = 1.0


class ProgressBar:
    """Bars on standard error, from `_PATIENCE_S` seconds on, gone when the waiting is over.

    Drawn by the waiting thread: rich would start one of its own, which the interpreter refuses when it ends.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._tasks: dict[int, TaskID] = {}
        self._is_shown = False

    def update(self, backlog: Backlog) -> None:
        """Show *backlog*; saves that are not in it any more are shown as complete."""
        if self._clock() - self._started < _PATIENCE_S:
            return
        if not self._is_shown:
            self._is_shown = True
            self._progress.start()
        pending = {save.step: save for save in backlog.saves}
        for step in pending.keys() - self._tasks.keys():
            self._tasks[step] = self._progress.add_task(f"step {step}", speed="")
        for step, task in self._tasks.items():
            if step in pending:
                save = pending[step]
                total = save.raw_bytes or None
                self._progress.update(task, total=total, completed=save.done_bytes, speed=_speed(backlog))
            else:
                self._progress.update(task, completed=self._progress.tasks[task].total or 0, speed="durable")
        self._progress.refresh()

    def close(self) -> None:
        """Take it off the screen."""
        if self._is_shown:
            self._progress.stop()

    def __repr__(self) -> str:
        return f"<ProgressBar of steps {sorted(self._tasks)}>"


def _speed(backlog: Backlog) -> str:
    if backlog.bytes_s is None or backlog.rest_s is None:
        return ""
    return f"{format_bytes(backlog.bytes_s)}/s, {format_seconds(backlog.rest_s)} to go"
