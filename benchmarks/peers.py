"""The savers that are compared, each behind the same five methods.

Each is set up the way its own documentation recommends for states on the CPU, and so that its
acknowledgement means the same as far as it can: file contents are fsynced before a save counts as
durable. What still differs is written beside each class and in README.md.
"""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from state import TrainingState

__all__ = ["PEERS", "Pending", "Saver"]


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


class Saver(ABC):
    """One way to save a training state into ``directory``, one entry per step."""

    requires: ClassVar[str] = "torch"

    def __init__(self, directory: Path, state: TrainingState) -> None:
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

    def close(self) -> None:  # noqa: B027  (most have nothing to stop)
        """Stop whatever runs in the background."""


class TorchSave(Saver):
    """``torch.save`` and fsync, while training waits. Pickle."""

    def save(self, step: int) -> Pending:
        path = self.path(step)
        with path.open("wb") as file:
            torch.save(self.state.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        _fsync_directory(self.directory)
        done: Future[None] = Future()
        done.set_result(None)
        return Pending(done)


class DcpAsyncSave(Saver):
    """``torch.distributed.checkpoint.async_save`` with a stager that is kept.

    A kept stager reuses its memory; the default one is made anew for every save and is slower. DCP
    fsyncs its files, but neither the directory nor its parent.
    """

    mode: ClassVar[Literal["thread", "process"]]

    def __init__(self, directory: Path, state: TrainingState) -> None:
        super().__init__(directory, state)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self.mode == "process":
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{directory.resolve()}/rendezvous", rank=0, world_size=1
            )
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,  # needs CUDA, like the next two
                use_shared_memory=self.mode == "process",
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def save(self, step: int) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

        future = async_save(
            self.state.state_dict(),
            checkpoint_id=self.path(step),
            async_checkpointer_type=AsyncCheckpointerType(self.mode),
            async_stager=self._stager,
        )
        return Pending(cast("Future[Any]", future))  # the other kind comes from stagers that stage later

    def close(self) -> None:
        self._stager.close()
        if self.mode == "process":
            torch.distributed.destroy_process_group()


class DcpThread(DcpAsyncSave):
    """DCP, serialised and written by a thread of the training process."""

    mode = "thread"


class DcpProcess(DcpAsyncSave):
    """DCP, serialised and written by a process of its own; the snapshot lies in shared memory."""

    mode = "process"


class TorchCheckpointing(Saver):
    """Meta's ``torch_checkpointing``: staged by a thread, written by a process.

    It never fsyncs, so its own acknowledgement survives a killed process but not a power cut; here
    its documented finalize hook, which runs in its writer process, fsyncs every file before the rename.
    """

    requires = "torch_checkpointing"

    def __init__(self, directory: Path, state: TrainingState) -> None:
        super().__init__(directory, state)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        def make(use_direct_io: bool) -> CheckpointManager:
            return CheckpointManager.Config(
                storage_config=LocalFileSystemStorageConfig(use_direct_io=use_direct_io),
                pre_finalize_callback=_fsync_files,
            ).build()

        self.use_direct_io = True
        self._manager = make(True)
        try:
            self._save_to(directory / "probe", {"probe": torch.arange(1000)}).result()
        except Exception:  # its default writes unaligned blocks, which ext4 and XFS refuse for O_DIRECT
            self.use_direct_io = False
            with suppress(Exception):
                self._manager.close()
            self._manager = make(False)
        shutil.rmtree(directory / "probe", ignore_errors=True)

    def _save_to(self, path: Path, values: dict[str, Any]) -> Future[Any]:
        return cast("Future[Any]", self._manager.save(str(path), values))  # None only from synchronous savers

    def save(self, step: int) -> Pending:
        return Pending(self._save_to(self.path(step), self.state.state_dict()))

    def guard(self) -> AbstractContextManager[object]:
        return self._manager.lock()

    def close(self) -> None:
        self._manager.close()


class Asyncckpt(Saver):
    """asyncckpt with its defaults; durable means data, directories and the rename are on the disk."""

    requires = "asyncckpt"
    compression: ClassVar[Literal["fast", "small", "none"]] = "fast"

    def __init__(self, directory: Path, state: TrainingState) -> None:
        super().__init__(directory, state)
        import asyncckpt as ac

        self._checkpointer = ac.Checkpointer(
            directory, state.objects(), keep=ac.Keep(last=100), compression=self.compression
        )
        self._checkpointer.step(0)  # as every training loop does: lets it prepare memory before the first save

    def save(self, step: int) -> Pending:
        return Pending(self._checkpointer.save(step))

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def discard(self, step: int) -> None:
        self._checkpointer.delete(step)

    def close(self) -> None:
        self._checkpointer.close()


class AsyncckptNone(Asyncckpt):
    """asyncckpt without compression."""

    compression = "none"


PEERS: dict[str, type[Saver]] = {
    "torch.save": TorchSave,
    "dcp.async_save thread": DcpThread,
    "dcp.async_save process": DcpProcess,
    "torch_checkpointing": TorchCheckpointing,
    "asyncckpt fast": Asyncckpt,
    "asyncckpt none": AsyncckptNone,
}
"""Every saver by the name it has in the tables."""


def _fsync_files(args: Any) -> None:
    """Finalize hook of torch_checkpointing: module level, because it is pickled for its process."""
    for path in Path(args.path).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
