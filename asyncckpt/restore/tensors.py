"""Tensors over bytes that were read."""

from __future__ import annotations

import base64
import binascii
import math

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.header import InlineTensor
from asyncckpt.format.layout import ArrayLayout
from asyncckpt.format.limits import MAX_DIMENSIONS

__all__ = ["inline_tensor", "tensor_over"]


def inline_tensor(inline: InlineTensor) -> torch.Tensor:
    """The tensor that a header holds.

    Raises:
        CorruptCheckpointError: it is malformed.
    """
    try:
        data = bytearray(base64.b64decode(inline.data, validate=True))
    except (binascii.Error, ValueError) as error:
        raise CorruptCheckpointError(f"an inline tensor is malformed: {error}") from error
    if inline.dtype not in DATA_TYPES or len(inline.shape) > MAX_DIMENSIONS or min(inline.shape, default=0) < 0:
        raise CorruptCheckpointError("an inline tensor has an unknown type or shape")
    if len(data) != math.prod(inline.shape) * DATA_TYPES[inline.dtype].itemsize:
        raise CorruptCheckpointError("an inline tensor has the wrong size")
    try:
        return _view(memoryview(data), inline.dtype, tuple(inline.shape))
    except (RuntimeError, TypeError, OverflowError) as error:  # an empty one with more elements than can be counted
        raise CorruptCheckpointError(f"an inline tensor has an impossible shape: {error}") from error


def tensor_over(layout: ArrayLayout, data: memoryview) -> torch.Tensor:
    """The tensor over *data*, the raw bytes of an array of *layout*.

    Raises:
        CorruptCheckpointError: this torch has no such type.
    """
    return _view(data, layout.data_type.name, layout.shape)


def _view(data: memoryview, data_type: str, shape: tuple[int, ...]) -> torch.Tensor:
    dtype: torch.dtype | None = getattr(torch, data_type, None)
    if dtype is None:
        raise CorruptCheckpointError(f"this torch has no {data_type}")
    if len(data) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)
