"""The savers whose durability is compared: each saves, lists what it offers, and loads into live tensors.

Unlike in `peers`, nothing is added to what a saver does by itself: no fsync, no rename. What is
measured is what a user gets who follows its documentation.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

__all__ = ["SAVERS", "FaultSaver", "State", "make_state"]

State = dict[str, torch.Tensor]
_SIZES = (2 * 2**20, *[100_000] * 8, *[1000] * 16)


def make_state(step: int) -> State:
    """About 12 MB in 25 float32 tensors, different for every *step* and the same every time."""
    generator = torch.Generator().manual_seed(step)
    return {f"layer_{index}": torch.randn(size, generator=generator) for index, size in enumerate(_SIZES)}


class FaultSaver(ABC):
    """One way to save into *directory*."""

    name: ClassVar[str]
    requires: ClassVar[str] = "torch"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def save(self, step: int, state: State) -> None:
        """Save and return when the saver says that it is done."""

    @abstractmethod
    def load(self, step: int, into: State) -> None:
        """Load into live tensors; raises whatever the saver raises."""

    @abstractmethod
    def offered(self) -> list[int]:
        """The steps that a user of this saver would find, ascending."""

    def path(self, step: int) -> Path:
        """What the save of *step* left."""
        return self.directory / f"step-{step}"

    def steps(self) -> list[int]:
        """Numbers of all ``step-N`` there are."""
        found = (path.name.partition("-")[2].partition(".")[0] for path in self.directory.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit())

    def settle(self) -> None:  # noqa: B027  (most have nothing in the background)
        """Wait for what still works in the background although the trainer is dead."""

    def survivors(self) -> list[int]:
        """Processes that are not in the trainer's process group."""
        return []

    def close(self) -> None:  # noqa: B027
        """Release what was opened."""


class TorchSave(FaultSaver):
    """``torch.save`` to the final name; offered is every file."""

    name = "torch.save"

    def save(self, step: int, state: State) -> None:
        torch.save(state, self.path(step))

    def load(self, step: int, into: State) -> None:
        loaded = torch.load(self.path(step), weights_only=True)
        for name, tensor in into.items():
            tensor.copy_(loaded[name])

    def offered(self) -> list[int]:
        return self.steps()


class DcpSave(FaultSaver):
    """``torch.distributed.checkpoint.save`` with its defaults; offered is what has its ``.metadata``."""

    name = "dcp.save"

    def save(self, step: int, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(state), checkpoint_id=self.path(step), no_dist=True)

    def load(self, step: int, into: State) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(into), checkpoint_id=self.path(step), no_dist=True)

    def offered(self) -> list[int]:
        return [step for step in self.steps() if (self.path(step) / ".metadata").exists()]


class TorchCheckpointing(FaultSaver):
    """Meta's ``torch_checkpointing``, asynchronous, waited for; offered is every directory under its final name."""

    name = "torch_checkpointing"
    requires = "torch_checkpointing"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._managers: list[Any] = []

    def _manager(self, **config: Any) -> Any:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Its default writes unaligned blocks, which ext4 refuses for O_DIRECT.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        manager = CheckpointManager.Config(storage_config=storage, **config).build()
        self._managers.append(manager)
        return manager

    def save(self, step: int, state: State) -> None:
        manager = self._managers[0] if self._managers else self._manager()
        manager.save(str(self.path(step)), dict(state)).result()

    def load(self, step: int, into: State) -> None:
        from torch_checkpointing import SyncCheckpointSaverConfig

        # Synchronous: only loading, it needs no writer process.
        loaded = self._manager(save=SyncCheckpointSaverConfig()).load(str(self.path(step)), into=dict(into))
        for name, tensor in into.items():
            if loaded[name] is not tensor:
                tensor.copy_(loaded[name])

    def offered(self) -> list[int]:
        return self.steps()

    def close(self) -> None:
        for manager in self._managers:
            manager.close()
        self._managers.clear()


class Asyncckpt(FaultSaver):
    """asyncckpt with its defaults; offered is what its catalogue lists."""

    name = "asyncckpt"
    requires = "asyncckpt"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._checkpointer = None

    def save(self, step: int, state: State) -> None:
        import asyncckpt as ac

        if self._checkpointer is None:
            self._checkpointer = ac.Checkpointer(self.directory, keep=ac.Keep(last=None))
        self._checkpointer.save(step, state).result()

    def load(self, step: int, into: State) -> None:
        import asyncckpt as ac

        loaded = ac.load(self.directory, step)
        for name, tensor in into.items():
            tensor.copy_(loaded[name])

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def offered(self) -> list[int]:
        import asyncckpt as ac

        return [info.step for info in ac.open(self.directory).checkpoints()]

    def survivors(self) -> list[int]:
        return [] if self._checkpointer is None else [self._checkpointer.health().writer_pid]

    def settle(self) -> None:
        # The writer of the dead trainer holds the lock of the root until it has committed what was staged.
        from asyncckpt.errors import RootLockedError
        from asyncckpt.repository import RunLock

        deadline = time.monotonic() + 60
        while (self.directory / ".asyncckpt").exists():
            try:
                RunLock.acquire(self.directory, timeout_s=60).release()
            except RootLockedError:
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()


SAVERS: dict[str, type[FaultSaver]] = {
    saver.name: saver for saver in (TorchSave, DcpSave, TorchCheckpointing, Asyncckpt)
}


def remove(path: Path) -> None:
    """Delete a file or directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
