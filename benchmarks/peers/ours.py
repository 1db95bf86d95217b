"""asyncckpt, with each of its presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from states import State
from torch import Tensor

from peers.base import Pending, Saver, look_up

__all__ = ["Asyncckpt", "AsyncckptNone", "AsyncckptSmall"]


class Asyncckpt(Saver):
    """asyncckpt with its defaults; durable means data, directories and the rename are on the disk."""

    requires = "asyncckpt"
    compression: ClassVar[Any] = "fast"
    snapshot: ClassVar[Any] = "auto"

    def __init__(self, directory: Path, state: State) -> None:
        super().__init__(directory, state)
        import asyncckpt as ac

        self._checkpointer = ac.Checkpointer(
            directory,
            state.objects(),
            keep=ac.Keep(last=100),
            compression=self.compression,
            staging=ac.Staging(snapshot=self.snapshot),
        )
        self._checkpointer.step(0)  # as every training loop does: lets it prepare memory before the first save

    def save(self, step: int) -> Pending:
        return Pending(self._checkpointer.save(step))

    def restore(self, step: int) -> None:
        self._checkpointer.restore(step)

    def load_one(self, step: int, path: str) -> Tensor:
        self._checkpointer.restore(step, only=path)
        return look_up(self.state.state_dict(), path)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def discard(self, step: int) -> None:
        self._checkpointer.delete(step)

    def close(self) -> None:
        self._checkpointer.close()


class AsyncckptNone(Asyncckpt):
    """asyncckpt without compression."""

    compression = "none"


class AsyncckptSmall(Asyncckpt):
    """asyncckpt, compressing more slowly and better."""

    compression = "small"
