"""Collects the tensors of a state: one leaf to store per tensor, one tree node per place it appears in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.state.arrays import Array, array_to_tensor
from asyncckpt.state.tensors import PLAIN_KINDS, plain_tensor
from asyncckpt.state.tied import SharedTensor, tie_views
from asyncckpt.state.torch_types import ZARR_NAMES, torch_name

__all__ = ["LeafCollector", "TensorLeaf"]

_TensorNode = dict[str, Any]
_Shape = tuple[tuple[int, ...], list[int]]
# Complex tensors may be lazily conjugated, which costs a check of its own.
_FAST = {dtype: name for dtype, name in ZARR_NAMES.items() if not dtype.is_complex}


class TensorLeaf(NamedTuple):
    """One array to store.

    A tuple, not a dataclass: 10,000 are made in every save.

    Attributes:
        key: array key inside the step, ``state/model/lm_head.weight``.
        tensor: detached, strided, on any device; may alias the live tensor.
        data_type: Zarr name.
        shape: shape of the array.
        torch_dtype: torch's name for the type when Zarr has none; *tensor* then holds its bytes.
        trained: whether gradients are wanted for it, so that training should change it.
    """

    key: str
    tensor: torch.Tensor
    data_type: str
    shape: tuple[int, ...]
    torch_dtype: str | None
    trained: bool = False


class LeafCollector:
    """Turns tensors and arrays into nodes, and remembers what has to be stored.

    Keys must be unique; whoever walks the state sees to that. The order of the leaves is the order of
    the calls, so equal structures give equal lists.
    """

    def __init__(self) -> None:
        self._leaves: list[TensorLeaf] = []
        self._nodes: list[_TensorNode] = []
        # Address of a storage to the first leaf over it; `_shared` has those with a second one.
        self._first: dict[int, int] = {}
        self._shared: dict[int, list[int]] = {}
        # Each shape once: fewer objects to make, and for the garbage collector to visit.
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._arrays: dict[int, tuple[Array, _TensorNode]] = {}
        self._bytes: dict[tuple[object, ...], _TensorNode] = {}

    def add_tensor(self, tensor: torch.Tensor, key: str, path: str) -> _TensorNode:
        """The node of *tensor*, which is to be stored under *key*.

        Raises:
            UnsupportedStateError: it is of a kind that cannot be stored; see `plain_tensor`.
        """
        # The hot path: every attribute read here costs a millisecond per 10,000 tensors, and half
        # as much again on a Parameter, which takes part in autograd.
        trained = False
        if type(tensor) is nn.Parameter:
            trained = tensor.requires_grad
            tensor = tensor.detach()
        name = _FAST.get(tensor.dtype)
        if name is None or type(tensor) not in PLAIN_KINDS or tensor.is_neg():
            return self._add_special(tensor, key, path, trained)
        try:
            address = tensor.untyped_storage().data_ptr()
            size = tensor.shape
        except RuntimeError:  # sparse, nested and opaque tensors have no storage or no shape
            return self._add_special(tensor, key, path, trained)
        shape = self._shapes.get(size)
        if shape is None:
            shape = self._shapes[size] = (tuple(size), list(size))
        if not address and 0 not in size:
            plain_tensor(tensor, path)  # says why: meta, or its storage was freed
        if tensor.requires_grad:
            trained = tensor.is_leaf
            tensor = tensor.detach()
        return self._append_tensor(tensor, key, name, shape, address, trained)

    def _append_tensor(
        self, tensor: torch.Tensor, key: str, name: str, shape: _Shape, address: int, trained: bool
    ) -> _TensorNode:
        node = {"$": "tensor", "key": key, "dtype": name, "shape": shape[1]}
        if not tensor.is_cpu:
            node["device"] = tensor.device.type
        index = len(self._leaves)
        if address and self._first.setdefault(address, index) != index:
            self._shared.setdefault(address, [self._first[address]]).append(index)
        self._leaves.append(TensorLeaf(key, tensor, name, shape[0], None, trained))
        self._nodes.append(node)
        return node

    def add_array(self, array: Array, key: str, path: str) -> _TensorNode:
        """The node of *array*; the same object twice is stored once.

        Raises:
            UnsupportedStateError: its type cannot be stored.
        """
        known = self._arrays.get(id(array))
        if known is not None:
            return dict(known[1])
        tensor = array_to_tensor(array, path)
        name = torch_name(tensor.dtype)
        node: _TensorNode = {"$": "ndarray", "key": key, "dtype": name, "shape": list(array.shape)}
        self._append(TensorLeaf(key, tensor, name, tuple(array.shape), None), node)
        self._arrays[id(array)] = (array, node)  # holding the array keeps its id from being reused
        return node

    def finish(self) -> list[TensorLeaf]:
        """The leaves to store, ties resolved in the nodes given out."""
        dropped: set[int] = set()
        for indices in self._shared.values():
            dropped |= tie_views(
                SharedTensor(index, self._leaves[index].tensor, self._nodes[index])
                for index in indices
                if self._leaves[index].tensor.numel()
            )
        if not dropped:
            return self._leaves
        return [leaf for index, leaf in enumerate(self._leaves) if index not in dropped]

    def _append(self, leaf: TensorLeaf, node: _TensorNode) -> None:
        self._leaves.append(leaf)
        self._nodes.append(node)

    def _add_special(self, tensor: torch.Tensor, key: str, path: str, trained: bool) -> _TensorNode:
        trained = trained or (tensor.requires_grad and tensor.is_leaf)
        plain = plain_tensor(tensor, path)
        if plain.is_quantized:
            return self._add_quantized(plain, key, path)
        name = ZARR_NAMES.get(plain.dtype)
        if name is None:
            return self._add_bytes(plain, key)
        shape = tuple(plain.shape)
        address = plain.untyped_storage().data_ptr()
        return self._append_tensor(plain, key, name, (shape, list(shape)), address, trained)

    def _add_bytes(self, tensor: torch.Tensor, key: str) -> _TensorNode:
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        known = self._bytes.get(identity) if tensor.numel() else None
        if known is not None:
            return dict(known)
        node: _TensorNode = {"$": "tensor", "key": key, "dtype": torch_name(tensor.dtype), "shape": list(tensor.shape)}
        if not tensor.is_cpu:
            node["device"] = tensor.device.type
        stored = _as_bytes(tensor)
        self._append(TensorLeaf(key, stored, "uint8", tuple(stored.shape), node["dtype"]), node)
        self._bytes[identity] = node
        return node

    def _add_quantized(self, tensor: torch.Tensor, key: str, path: str) -> _TensorNode:
        node: _TensorNode = {"$": "quantized", "dtype": torch_name(tensor.dtype)}
        scheme = tensor.qscheme()
        if tensor.dtype not in (torch.qint8, torch.quint8, torch.qint32) or scheme not in (
            torch.per_tensor_affine,
            torch.per_channel_affine,
        ):
            raise UnsupportedStateError(
                f"{path} is a quantised tensor of type {tensor.dtype} and scheme {scheme}, which cannot be stored",
                key=path,
                type=str(tensor.dtype),
            )
        node["values"] = self.add_tensor(tensor.int_repr(), f"{key}/values", path)
        if scheme == torch.per_tensor_affine:
            node["scale"] = tensor.q_scale()
            node["zero_point"] = tensor.q_zero_point()
        else:
            node["axis"] = tensor.q_per_channel_axis()
            node["scales"] = self.add_tensor(tensor.q_per_channel_scales(), f"{key}/scales", path)
            node["zero_points"] = self.add_tensor(tensor.q_per_channel_zero_points(), f"{key}/zero_points", path)
        return node


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as ``uint8``, the last axis multiplied by their size; docs/format.md section 5."""
    if tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8)
    flat = tensor.contiguous()
    return (flat.reshape(1) if flat.dim() == 0 else flat).view(torch.uint8)
