"""What comes with torch: ``torch.save`` and ``torch.distributed.checkpoint`` (DCP)."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from states import State
from torch import Tensor

from peers.base import Pending, Saver, copy_into, fsync_path, look_up, settled

__all__ = ["DcpProcess", "DcpSave", "DcpThread", "TorchMmap", "TorchSave"]


class TorchSave(Saver):
    """``torch.save`` and fsync, while training waits. Pickle.

    Source: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html (general checkpoint), which loads
    with ``weights_only=True``.
    """

    mmap: ClassVar[bool] = False

    def save(self, step: int) -> Pending:
        path = self.path(step)
        with path.open("wb") as file:
            torch.save(self.state.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        fsync_path(self.directory)
        return settled()

    def restore(self, step: int) -> None:
        copy_into(self.state.state_dict(), torch.load(self.path(step), mmap=self.mmap, weights_only=True))

    def load_one(self, step: int, path: str) -> Tensor:
        return look_up(torch.load(self.path(step), mmap=self.mmap, weights_only=True), path).clone()


class TorchMmap(TorchSave):
    """The same file, mapped instead of read.

    Source: https://docs.pytorch.org/tutorials/recipes/recipes/module_load_state_dict_tips.html (mmap=True).
    """

    mmap = True


class _Dcp(Saver):
    """What the modes of DCP have in common. It loads in place.

    Source: https://docs.pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html
    """

    def restore(self, step: int) -> None:
        from torch.distributed import checkpoint

        checkpoint.load(self.state.state_dict(), checkpoint_id=self.path(step))

    def load_one(self, step: int, path: str) -> Tensor:
        from torch.distributed import checkpoint

        item, _, name = path.partition("/")
        tensor = torch.empty_like(look_up(self.state.state_dict(), path))
        checkpoint.load({item: {name: tensor}}, checkpoint_id=self.path(step))
        return tensor


class DcpSave(_Dcp):
    """``torch.distributed.checkpoint.save``, while training waits."""

    def save(self, step: int) -> Pending:
        from torch.distributed import checkpoint

        checkpoint.save(self.state.state_dict(), checkpoint_id=self.path(step))
        return settled()


class DcpAsyncSave(_Dcp):
    """``torch.distributed.checkpoint.async_save`` with a stager that is kept.

    A kept stager reuses its memory; the default one is made anew for every save and is slower. DCP
    fsyncs its files, but neither the directory nor its parent.
    """

    mode: ClassVar[Literal["thread", "process"]]

    def __init__(self, directory: Path, state: State) -> None:
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
