"""Numpy arrays and scalars as tensors, and back."""

from __future__ import annotations

import base64
from typing import Any

import ml_dtypes
import numpy as np
import torch

from asyncckpt.errors import CorruptCheckpointError, UnsupportedStateError
from asyncckpt.format.dtypes import DATA_TYPES

__all__ = ["array_to_tensor", "decode_scalar", "encode_scalar", "numpy_dtype", "tensor_to_array"]

Array = np.ndarray[Any, Any]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The native-endian dtype called *name*, those of ml_dtypes included.

    Raises:
        CorruptCheckpointError: there is none that can be stored.
    """
    if name not in DATA_TYPES:
        raise CorruptCheckpointError(f"{name!r} is not an array type of format 1")
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def array_to_tensor(array: Array, path: str) -> torch.Tensor:
    """A CPU tensor of the values of *array*, sharing its memory where torch can.

    Raises:
        UnsupportedStateError: object, structured, text, time and extended precision types.
    """
    name = _checked_name(array.dtype, path)
    array = np.asarray(array)  # memmap and other subclasses that are arrays all the same
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Torch takes neither negative strides nor, without a warning, read-only memory.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if hasattr(ml_dtypes, name):
        stored = array.view(DATA_TYPES[name].numpy.newbyteorder("="))
        return torch.from_numpy(stored).view(getattr(torch, name))
    return torch.from_numpy(array)


def tensor_to_array(tensor: torch.Tensor, name: str) -> Array:
    """The numpy array called *name* over the memory of a contiguous CPU tensor; inverse of `array_to_tensor`."""
    dtype = numpy_dtype(name)
    if hasattr(ml_dtypes, name):
        tensor = tensor.view(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    return tensor.numpy().view(dtype)


def _checked_name(dtype: np.dtype[Any], path: str) -> str:
    name = dtype.name
    if name not in DATA_TYPES or not hasattr(torch, name):
        raise UnsupportedStateError(
            f"{path} is a numpy array of type {dtype}, which cannot be stored; convert it to numbers or booleans first",
            key=path,
            type=f"numpy.ndarray[{dtype}]",
        )
    return name


def encode_scalar(value: np.generic, path: str) -> dict[str, Any]:
    """Node of a numpy scalar: its bytes, so that NaN payloads stay.

    Raises:
        UnsupportedStateError: as for arrays.
    """
    array = np.asarray(value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    name = _checked_name(array.dtype, path)
    little = array.view(DATA_TYPES[name].numpy.newbyteorder("=")).astype(DATA_TYPES[name].numpy)
    return {"$": "npscalar", "dtype": name, "data": base64.b64encode(little.tobytes()).decode("ascii")}


def decode_scalar(node: dict[str, Any]) -> np.generic:
    """Inverse of `encode_scalar`."""
    dtype = numpy_dtype(node["dtype"])
    stored = DATA_TYPES[node["dtype"]].numpy
    data = base64.b64decode(node["data"], validate=True)
    if len(data) != stored.itemsize:
        raise CorruptCheckpointError(f"a scalar of type {dtype} has {len(data)} bytes")
    scalar: np.generic = np.frombuffer(data, stored).astype(stored.newbyteorder("=")).view(dtype)[0]
    return scalar
