"""Meta's ``torch_checkpointing``."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from states import State

from peers.base import Pending, Saver, fsync_all

__all__ = ["TorchCheckpointing"]


class TorchCheckpointing(Saver):
    """Meta's ``torch_checkpointing``: staged by a thread, written by a process.

    It never fsyncs, so its own acknowledgement survives a killed process but not a power cut; here
    its documented finalize hook, which runs in its writer process, fsyncs every file before the rename.
    """

    requires = "torch_checkpointing"

    def __init__(self, directory: Path, state: State) -> None:
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

    def restore(self, step: int) -> None:
        self._manager.load(str(self.path(step)), into=self.state.state_dict())

    def guard(self) -> AbstractContextManager[object]:
        return self._manager.lock()

    def close(self) -> None:
        self._manager.close()


def _fsync_files(args: Any) -> None:
    """Finalize hook of torch_checkpointing: module level, because it is pickled for its process."""
    fsync_all(Path(args.path))
