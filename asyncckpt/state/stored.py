"""A checkpoint's tree as Python values, with placeholders where tensors will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.paths import check_key
from asyncckpt.format.tree import Node, decode_value
from asyncckpt.state.arrays import decode_scalar, numpy_dtype
from asyncckpt.state.optimizer import RESERVED, StoredOptimizer, parameters_from_nodes
from asyncckpt.state.torch_types import TORCH_DTYPES

__all__ = [
    "StoredArray",
    "StoredCustom",
    "StoredQuantized",
    "StoredTensor",
    "StoredView",
    "array_keys",
    "children",
    "decode_tree",
]


_MAX_SIZE = 2**62


class StoredView(NamedTuple):
    """Part of an array; ``stride`` and ``offset`` count elements of its flat C order form."""

    stride: tuple[int, ...]
    offset: int


class StoredTensor(NamedTuple):
    """A tensor to read.

    Attributes:
        key: array it is in.
        dtype: its type.
        shape: its shape.
        device: type of the device it was on, ``"cpu"`` or ``"cuda"``.
        view: which part of the array it is; None is all of it.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str
    view: StoredView | None

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class StoredArray(NamedTuple):
    """A numpy array to read; *dtype* is its numpy name."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"numpy {self.dtype} {list(self.shape)}"


class StoredQuantized(NamedTuple):
    """A quantised tensor: integers, and per tensor or per channel a scale and a zero point.

    Attributes:
        dtype: torch's quantised type.
        values: the integers.
        scale: a number, or float64 per channel.
        zero_point: a number, or int64 per channel.
        axis: the channels; None for one scale per tensor.
    """

    dtype: torch.dtype
    values: StoredTensor
    scale: float | StoredTensor
    zero_point: int | StoredTensor
    axis: int | None

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.values.shape)}"


class StoredCustom(NamedTuple):
    """A value of a registered type: what its ``encode`` returned."""

    name: str
    value: Any


def decode_tree(tree: Node) -> dict[str, Any]:
    """The state that *tree* describes, without its tensors.

    Raises:
        CorruptCheckpointError: *tree* is not a tree `capture` makes.
        UnsupportedStateError: it needs an enum class that is not imported here.
    """
    state = _decode(tree, 0)
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise CorruptCheckpointError("the tree of the checkpoint is not a state with named entries")
    return state


def _decode(node: Node, depth: int) -> Any:
    return decode_value(node, _decode_tag, depth)


def _decode_tag(node: dict[str, Any], depth: int) -> Any:
    tag = node["$"]
    if tag in _NESTED_TAGS:
        return _NESTED_TAGS[tag](node, depth + 1)
    decode = _TAGS.get(tag)
    if decode is None:
        raise CorruptCheckpointError(f"the state tree has an unknown tag {str(tag)[:100]!r}")
    return decode(node)


def _tensor(node: dict[str, Any]) -> StoredTensor:
    shape = _shape(node["shape"])
    view = None
    if "view" in node:
        part = node["view"]
        view = StoredView(_shape(part["stride"]), _shape([part["offset"]])[0])
        if _shape(part["shape"]) != shape or len(view.stride) != len(shape):
            raise CorruptCheckpointError(f"a view of {node['key']} contradicts itself", key=node["key"])
    device = node.get("device", "cpu")
    if type(device) is not str:
        raise CorruptCheckpointError(f"{str(device)[:100]!r} is not a type of device")
    return StoredTensor(check_key(node["key"]), _dtype(node["dtype"]), shape, device, view)


def _shape(sizes: Any) -> tuple[int, ...]:
    shape = tuple(sizes)
    if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in shape):
        raise CorruptCheckpointError(f"{str(sizes)[:200]} is not a list of sizes")
    return shape


def _dtype(name: str) -> torch.dtype:
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise CorruptCheckpointError(f"the checkpoint has a tensor of type {name!r}, which this torch does not know")
    return dtype


def _array(node: dict[str, Any]) -> StoredArray:
    numpy_dtype(node["dtype"])
    return StoredArray(check_key(node["key"]), node["dtype"], _shape(node["shape"]))


def _quantized(node: dict[str, Any]) -> StoredQuantized:
    dtype, values = _dtype(node["dtype"]), _tensor(node["values"])
    if "axis" in node:
        return StoredQuantized(
            dtype, values, _tensor(node["scales"]), _tensor(node["zero_points"]), _shape([node["axis"]])[0]
        )
    return StoredQuantized(dtype, values, float(node["scale"]), int(node["zero_point"]), axis=None)


def _custom(node: dict[str, Any], depth: int) -> StoredCustom:
    return StoredCustom(node["type"], _decode(node["value"], depth))


def _optimizer(node: dict[str, Any], depth: int) -> StoredOptimizer:
    parameters = parameters_from_nodes(_decode(node["parameters"], depth), _decode(node["modules"], depth))
    sizes = _shape(node["group_sizes"])
    groups, extra_state, extra = (_decode(node[name], depth) for name in RESERVED)
    stored = StoredOptimizer(parameters, sizes, groups, _decode(node["slots"], depth), extra_state, extra)
    labels = {parameter.label for parameter in parameters}
    if (
        len(labels) != len(parameters)
        or sum(sizes) != len(parameters)
        or len(sizes) != len(groups)
        or not all(type(part) is dict for part in (*groups, stored.slots, extra_state, extra))
        or not all(type(values) is dict and values.keys() <= labels for values in stored.slots.values())
    ):
        raise CorruptCheckpointError("an optimizer in the state tree contradicts itself")
    return stored


def _device(node: dict[str, Any]) -> torch.device:
    try:
        return torch.device(node["name"])
    except RuntimeError as error:
        raise CorruptCheckpointError(f"{node['name']!r} is not a device of this torch") from error


_TAGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tensor": _tensor,
    "ndarray": _array,
    "quantized": _quantized,
    "npscalar": decode_scalar,
    "torch.dtype": lambda node: _dtype(node["name"]),
    "torch.device": _device,
    "torch.Size": lambda node: torch.Size(_shape(node["items"])),
}

_NESTED_TAGS: dict[str, Callable[[dict[str, Any], int], Any]] = {"custom": _custom, "optimizer": _optimizer}


def children(stored: Any) -> Iterator[tuple[Any, Any]]:
    """Names and parts of a decoded value; nothing for a leaf, a placeholder included."""
    if isinstance(stored, dict):
        yield from stored.items()
    elif type(stored) in (list, tuple):
        yield from enumerate(stored)
    elif type(stored) is StoredCustom:
        yield from children(stored.value)
    elif type(stored) is StoredOptimizer:
        yield from stored.slots.items()
        yield from zip(RESERVED, (stored.groups, stored.extra_state, stored.extra), strict=True)


def array_keys(stored: Any) -> Iterator[str]:
    """Keys of every array below a decoded value."""
    if type(stored) in (StoredTensor, StoredArray):
        yield stored.key
    elif type(stored) is StoredQuantized:
        for part in (stored.values, stored.scale, stored.zero_point):
            yield from array_keys(part)
    elif type(stored) is StoredCustom:
        yield from array_keys(stored.value)
    else:
        for _, part in children(stored):
            yield from array_keys(part)
