"""What every saver has in common: five methods to save, two to load."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol

from state import iter_tensors
from states import State
from torch import Tensor

__all__ = ["Pending", "Saver", "copy_into", "fsync_all", "fsync_path", "look_up", "settled"]


class _Settled(Protocol):
    def done(self) -> bool: ...
    def result(self) -> Any: ...
    def add_done_callback(self, callback: Callable[[Any], object]) -> object: ...


class Pending:
    """A save under way.

    Attributes:
        durable_at: ``time.perf_counter()`` when it was acknowledged.
    """

    def __init__(self, future: _Settled) -> None:
        self._future = future
        self.durable_at = 0.0
        future.add_done_callback(self._note)

    def _note(self, _: object) -> None:
        self.durable_at = time.perf_counter()

    def done(self) -> bool:
        return self.durable_at > 0.0

    def check(self) -> None:
        """Raise what made the save fail."""
        self._future.result()

    def wait(self) -> None:
        """Wait until the save is acknowledged; raises what made it fail."""
        self.check()
        while not self.done():  # the callbacks of a future run after its waiters are woken
            time.sleep(0)


class Saver(ABC):
    """One way to save a training state into ``directory``, one entry per step."""

    requires: ClassVar[str] = "torch"

    def __init__(self, directory: Path, state: State) -> None:
        self.directory = directory
        self.state = state

    @abstractmethod
    def save(self, step: int) -> Pending:
        """Begin a save; returns once training may go on (and enter `guard` before it updates the state)."""

    def guard(self) -> AbstractContextManager[object]:
        """Entered around every update of the state."""
        return nullcontext()

    def path(self, step: int) -> Path:
        """What the save of *step* left on disk."""
        return self.directory / f"step-{step}"

    def discard(self, step: int) -> None:
        """Delete the save of *step*."""
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def restore(self, step: int) -> None:
        """Load the save of *step* into the live tensors of the state."""
        raise NotImplementedError

    def load_one(self, step: int, path: str) -> Tensor:
        """Load one tensor, by its ``/``-joined path in the state, and nothing else if the format allows."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027  (most have nothing to stop)
        """Stop whatever runs in the background."""


def settled() -> Pending:
    """What a saver returns that is done when its call returns."""
    done: Future[None] = Future()
    done.set_result(None)
    return Pending(done)


def copy_into(live: Any, loaded: Any) -> None:
    """Copy every tensor of *loaded* into the tensor of the same path in *live*."""
    sources = dict(iter_tensors(loaded))
    for path, tensor in iter_tensors(live):
        tensor.detach().copy_(sources[path])


def look_up(values: Any, path: str) -> Tensor:
    """The tensor at a ``/``-joined *path* of nested dictionaries."""
    for part in path.split("/"):
        values = values[int(part) if part.isdigit() else part]
    tensor: Tensor = values
    return tensor


def fsync_all(directory: Path) -> None:
    """Fsync every file below *directory*."""
    for path in directory.rglob("*"):
        if path.is_file():
            fsync_path(path)


def fsync_path(path: Path) -> None:
    """Fsync a file, or a directory: the names in it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
