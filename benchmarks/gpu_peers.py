"""The savers that are compared on a GPU, each behind the methods of `peers.Saver`.

Each is set up as its documentation recommends for states on CUDA devices. ``guard`` waits where the documentation
says that the state must not be updated before staging is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args

import torch
from peers import Asyncckpt, Pending, Saver, TorchCheckpointing, TorchSave
from state import TrainingState
from torch import Tensor

__all__ = ["GPU_PEERS", "read_back"]


class DcpDefault(Saver):
    """``dcp.async_save`` as it comes: a new stager for each save, pageable memory, `save` waits for the copies."""

    def save(self, step: int) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        future = async_save(self.state.state_dict(), checkpoint_id=self.path(step), no_dist=True)
        return Pending(cast("Future[Any]", future))


class DcpPinned(Saver):
    """``dcp.async_save`` with a kept stager of ``StagingOptions()``: pinned and shared memory, non-blocking copies.

    A thread stages; the state must not be updated before it is done, hence the guard.
    """

    def __init__(self, directory: Path, state: TrainingState) -> None:
        super().__init__(directory, state)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        has_cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=has_cuda,
                use_shared_memory=True,
                use_async_staging=has_cuda,
                use_non_blocking_copy=has_cuda,
            )
        )
        self._staging: Future[Any] | None = None

    def save(self, step: int) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        response: Any = async_save(
            self.state.state_dict(), checkpoint_id=self.path(step), async_stager=self._stager, no_dist=True
        )
        self._staging = getattr(response, "staging_completion", None)
        return Pending(getattr(response, "upload_completion", response))

    @contextmanager
    def _staged(self) -> Iterator[None]:
        if self._staging is not None:
            self._staging.result()
            self._staging = None
        yield

    def guard(self) -> AbstractContextManager[object]:
        return self._staged()

    def close(self) -> None:
        self._stager.close()


class _AsyncckptMode(Asyncckpt):
    """asyncckpt with one ``Staging(snapshot=)``."""

    _last: Any = None

    def save(self, step: int) -> Pending:
        self._last = self._checkpointer.save(step)
        return Pending(self._last)

    def wait_staged(self) -> None:
        """Until the snapshot of the last save is in host memory."""
        self._last.wait_staged()


def _modes() -> dict[str, type[Saver]]:
    """Every mode of this version."""
    import_module("common")  # puts the checkout on the path
    options = import_module("asyncckpt.options")
    return {
        f"asyncckpt {mode}": type(f"Asyncckpt{mode.title()}", (_AsyncckptMode,), {"snapshot": mode})
        for mode in get_args(options.SnapshotMode)
    }


GPU_PEERS: dict[str, type[Saver]] = {
    "torch.save": TorchSave,
    "dcp.async_save default": DcpDefault,
    "dcp.async_save pinned": DcpPinned,
    "torch_checkpointing": TorchCheckpointing,
    **_modes(),
}
"""Every saver by the name it has in the tables."""


def read_back(saver: Saver, step: int, like: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors that the save of *step* holds, of a state ``{"model": like}``; None for savers it cannot read."""
    if isinstance(saver, Asyncckpt):
        import asyncckpt as ac

        return dict(ac.load(saver.directory, step)["model"])
    if isinstance(saver, DcpDefault | DcpPinned):
        from torch.distributed import checkpoint as dcp

        into = {"model": {name: torch.zeros_like(tensor, device="cpu") for name, tensor in like.items()}}
        dcp.load(into, checkpoint_id=saver.path(step), no_dist=True)
        return into["model"]
    return None
