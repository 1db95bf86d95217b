"""Events as a JSON lines file."""

from __future__ import annotations

import errno
import json
import math
import os
from os import PathLike
from typing import Any

from asyncckpt.errors import InvalidOptionError
from asyncckpt.events import Event
from asyncckpt.logs import get_logger

__all__ = ["JsonLines"]

_logger = get_logger("asyncckpt")
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
# What a caller got wrong. Anything else, a full disk say, may pass, and is no reason not to train.
_MISTAKES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


class JsonLines:
    """Appends each event to a file, as one JSON object per line; give it as ``on_event=``.

    A line is ``{"time": ..., "event": "save.durable", "step": 500, ...}`` and the event's fields. It is one
    ``write`` in append mode: with the kernel when the call returns, whatever happens to the process then, and
    whole beside the lines of other processes. There is no buffer that a forked child could write a second time,
    and no lock that it could find locked.

    A line that cannot be written is lost and training goes on; the log says so, once, and again when lines can
    be written. A line that was cut by a full disk stands alone: readers skip what does not parse.

    The file should not lie on storage that may hang: the thread that saves waits for the ``write``.

    Args:
        path: the file; created when missing, never truncated.

    Attributes:
        num_lost: events that could not be written.

    Raises:
        InvalidOptionError: *path* is not a file that may be written.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self.num_lost = 0
        self._file = -1
        self._is_closed = False
        self._is_torn = True  # what an earlier process left may lack its newline; checked when it is opened
        self._num_lost_in_a_row = 0  # since a line was written
        try:
            self._open()
        except OSError as error:
            if error.errno in _MISTAKES:
                raise InvalidOptionError(f"events cannot be written to {self.path}: {error.strerror}") from error

    def __call__(self, event: Event) -> None:
        """Append *event*; never raises for what the file system does."""
        if self._is_closed:
            return
        line = json.dumps(event_object(event), allow_nan=False, default=str).encode() + b"\n"
        try:
            self._open()
            self._write(line)
        except OSError as error:
            self._note_lost(error)
        else:
            self._note_written()

    def close(self) -> None:
        """Close the file; later events are ignored. Idempotent."""
        self._is_closed = True
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        if self._file < 0:
            self._file = os.open(self.path, _FLAGS, 0o666)
            self._is_torn = not _ends_with_newline(self.path)

    def _write(self, line: bytes) -> None:
        # A cut line gets its newline now; with the line in one write, so that no other process comes between.
        data = b"\n" + line if self._is_torn else line
        written = os.write(self._file, data)
        if written < len(data):
            self._is_torn = True
            raise OSError(errno.ENOSPC, "only a part was written")
        self._is_torn = False

    def _note_lost(self, error: OSError) -> None:
        self.num_lost += 1
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row == 1:
            _logger.warning("events cannot be written to %s (%s); training goes on without", self.path, error)

    def _note_written(self) -> None:
        if self._num_lost_in_a_row:
            _logger.warning("events are written to %s again; %d were lost", self.path, self._num_lost_in_a_row)
            self._num_lost_in_a_row = 0

    def __repr__(self) -> str:
        lost = f", {self.num_lost} lost" if self.num_lost else ""
        return f"<JsonLines {self.path}{lost}>"


def event_object(event: Event) -> dict[str, Any]:
    """*event* as an object for strict JSON; numbers that JSON has no word for become texts such as ``"nan"``."""
    fields = {name: _json_value(value) for name, value in event.fields.items()}
    return {"time": event.time, "event": event.name, "step": event.step, **fields}


def _json_value(value: Any) -> Any:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _ends_with_newline(path: str) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
