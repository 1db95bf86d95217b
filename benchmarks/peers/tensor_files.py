"""Formats for tensors rather than for training states: safetensors, and TensorStore's Zarr."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from state import iter_tensors
from torch import Tensor

from peers.base import Pending, Saver, copy_into, fsync_path, settled

__all__ = ["Safetensors", "TensorStore"]


class Safetensors(Saver):
    """``safetensors.torch.save_file`` of the flattened state; fsynced by the benchmark, since it does not.

    Source: https://huggingface.co/docs/safetensors/api/torch
    """

    requires: ClassVar[str] = "safetensors"

    def save(self, step: int) -> Pending:
        from safetensors.torch import save_file

        save_file(dict(iter_tensors(self.state.state_dict())), self.path(step))
        fsync_path(self.path(step))
        fsync_path(self.directory)
        return settled()

    def restore(self, step: int) -> None:
        from safetensors.torch import load_file

        loaded = load_file(self.path(step))
        copy_into(dict(iter_tensors(self.state.state_dict())), loaded)

    def load_one(self, step: int, path: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path(step), framework="pt") as file:
            tensor: Tensor = file.get_tensor(path)
        return tensor.clone()  # it lies in a mapping of the file until then


class TensorStore(Saver):
    """One Zarr array per tensor through TensorStore's ``zarr3`` driver, all of them at once.

    Chunks, codecs (none) and synchronous files are its defaults; they are documented under
    https://google.github.io/tensorstore/driver/zarr3/ and https://google.github.io/tensorstore/kvstore/file/
    """

    requires: ClassVar[str] = "tensorstore"

    def _spec(self, step: int, path: str) -> dict[str, Any]:
        # Names of one component: TensorStore would not mind more, but only creates what it is told to.
        return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path(step)}/{path}/"}}

    def _open_all(self, step: int, **options: Any) -> dict[str, Any]:
        import tensorstore

        tensors = dict(iter_tensors(self.state.state_dict()))
        opening = {
            path: tensorstore.open(self._spec(step, path), **options, **self._shape(tensor, options))
            for path, tensor in tensors.items()
        }
        return {path: future.result() for path, future in opening.items()}

    @staticmethod
    def _shape(tensor: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        if "create" not in options:
            return {}
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

    def save(self, step: int) -> Pending:
        stores = self._open_all(step, create=True)
        tensors = dict(iter_tensors(self.state.state_dict()))
        for writing in [store.write(tensors[path].detach().numpy()) for path, store in stores.items()]:
            writing.result()
        return settled()

    def restore(self, step: int) -> None:
        reading = {path: store.read() for path, store in self._open_all(step, read=True).items()}
        loaded = {path: torch.from_numpy(future.result()) for path, future in reading.items()}
        copy_into(dict(iter_tensors(self.state.state_dict())), loaded)

    def load_one(self, step: int, path: str) -> Tensor:
        import tensorstore

        store = tensorstore.open(self._spec(step, path), read=True).result()
        return torch.from_numpy(store.read().result())
