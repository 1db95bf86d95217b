"""What staging needs to know of a captured tensor."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Leaf"]


class Leaf(Protocol):
    """One tensor of the state; ``state.capture.TensorLeaf`` is one. Fields as in `model.TensorSpec`."""

    @property
    def key(self) -> str: ...

    @property
    def tensor(self) -> torch.Tensor: ...

    @property
    def data_type(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def torch_dtype(self) -> str | None: ...

    @property
    def trained(self) -> bool: ...
