"""Copies from which a failed restore puts things back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt.state.fresh import owned_copy
from asyncckpt.state.tensors import copy_exact, plain_tensor

__all__ = ["ModuleBackup", "TensorBackup", "copied"]

_CPU = torch.device("cpu")


def copied(value: Any) -> Any:
    """A deep copy that also copes with tensors in the middle of a graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind((key, copied(part)) for key, part in value.items())
    if kind in (list, tuple):
        return kind(map(copied, value))
    return copy.deepcopy(value)


class TensorBackup:
    """Contents of tensors, in host memory: a second copy on the GPU may not fit."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        distinct = {id(tensor): tensor for tensor in tensors if _has_memory(tensor)}
        self._copies = [(tensor, owned_copy(plain_tensor(tensor, ""), _CPU)) for tensor in distinct.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the contents back."""
        for tensor, contents in self._copies:
            copy_exact(tensor, contents)


def _has_memory(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or is_lazy(tensor))


class ModuleBackup:
    """Parameters and buffers of a module: which they are, and what is in them."""

    def __init__(self, module: nn.Module) -> None:
        # A lazy tensor changes its class and memory when it is loaded; it is empty until then.
        self._lazy = [
            (tensor, type(tensor), tensor.data)
            for part in module.modules()
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if tensor is not None and is_lazy(tensor)
        ]
        self._members = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
        self._contents = TensorBackup(
            tensor
            for _, parameters, buffers in self._members
            for tensor in (*parameters.values(), *buffers.values())
            if tensor is not None
        )
        self._extra = [
            (part, copied(part.get_extra_state()))
            for part in module.modules()
            if type(part).get_extra_state is not nn.Module.get_extra_state
        ]

    def restore(self) -> None:
        """Put tensors, their contents and extra states back."""
        for part, parameters, buffers in self._members:
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)
        for tensor, kind, data in self._lazy:
            tensor.data, tensor.__class__ = data, kind
        self._contents.restore()
        for part, state in self._extra:
            part.set_extra_state(state)
