"""What a trainer has seen happen, kept where its death cannot reach it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Journal", "JournalReader", "Note"]


class Note(NamedTuple):
    """One line: ``event`` is ``opened``, ``restored``, ``staged``, ``acked``, ``failed``, ``closed`` or ``error``."""

    event: str
    number: int
    detail: str = ""


class Journal:
    """The writing end. One ``write`` on an O_APPEND descriptor is in the kernel, whole, when it returns."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def note(self, event: str, number: int, detail: str = "") -> None:
        os.write(self._fd, f"{event} {number} {detail!r}\n".encode())


class JournalReader:
    """The reading end; remembers how far it came."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._offset = 0

    def read(self) -> list[Note]:
        """The notes since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        lines = [line.split(" ", 2) for line in data.decode().splitlines()]
        return [Note(event, int(number), detail) for event, number, detail in lines]
