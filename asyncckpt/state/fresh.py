"""Puts tensors in the place of placeholders."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.state.arrays import Array, tensor_to_array
from asyncckpt.state.optimizer import StoredOptimizer
from asyncckpt.state.registry import codec_by_name
from asyncckpt.state.stored import StoredArray, StoredCustom, StoredQuantized, StoredTensor
from asyncckpt.state.torch_types import ZARR_NAMES, is_bytes_only

__all__ = ["Fresh", "ScratchTensors", "home", "owned_copy", "shaped"]

_CPU = torch.device("cpu")


def home(device: str) -> torch.device:
    """The device of this process that stands for *device*, where a tensor was when it was saved.

    Ranks save the same state from different GPUs, so only the type counts; without such a device
    it is the CPU.
    """
    if device == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if device in ("mps", "xpu") and getattr(torch, device).is_available():
        return torch.device(device)
    return torch.device("cpu")


class ScratchTensors:
    """Arrays as they were read, by key, checked against what the tree says of them."""

    def __init__(self, arrays: Mapping[str, torch.Tensor]) -> None:
        self._arrays = arrays

    def base(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole array *key*, contiguous, as *dtype*; flat when Zarr lacks that type.

        Raises:
            CorruptCheckpointError: it has another type, or was not read.
        """
        array = self._get(key)
        if array.dtype is dtype:
            return array.contiguous()
        # Types that Zarr lacks are stored as their bytes.
        if dtype in ZARR_NAMES or array.dtype is not torch.uint8 or array.numel() % dtype.itemsize:
            raise _contradiction(key, f"{array.dtype}, not {dtype}")
        return array.reshape(-1).view(dtype)

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """*stored*, over the memory it was read into.

        Raises:
            CorruptCheckpointError: array and tree disagree.
        """
        return shaped(self.base(stored.key, stored.dtype), stored)

    def array(self, stored: StoredArray) -> Array:
        """*stored*, over the memory it was read into.

        Raises:
            CorruptCheckpointError: array and tree disagree.
        """
        tensor = self.base(stored.key, getattr(torch, stored.dtype))
        if tuple(tensor.shape) != stored.shape:
            raise _contradiction(stored.key, f"{list(tensor.shape)}, not {list(stored.shape)}")
        return tensor_to_array(tensor, stored.dtype)

    def _get(self, key: str) -> torch.Tensor:
        try:
            return self._arrays[key]
        except KeyError:
            raise CorruptCheckpointError(f"{key} is missing from the checkpoint", key=key) from None


def shaped(base: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    """The tensor *stored* over the memory of the whole array it is in; *base* itself if it is all of it.

    Raises:
        CorruptCheckpointError: it does not fit.
    """
    if stored.view is None:
        if tuple(base.shape) == stored.shape:
            return base
        if stored.dtype in ZARR_NAMES or base.numel() != math.prod(stored.shape):
            raise _contradiction(stored.key, f"{list(base.shape)}, not {list(stored.shape)}")
        return base.reshape(stored.shape)
    stride, offset = stored.view
    last = offset + sum((size - 1) * step for size, step in zip(stored.shape, stride, strict=True))
    if offset > base.numel() or (0 not in stored.shape and last >= base.numel()):
        raise _contradiction(stored.key, f"{base.numel()} elements, fewer than a view of it needs")
    try:
        return base.as_strided(stored.shape, stride, base.storage_offset() + offset)
    except (RuntimeError, TypeError, OverflowError) as error:  # more elements than torch can count
        raise _contradiction(stored.key, f"a view that torch refuses: {error}") from error


def _contradiction(key: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"array and header disagree on {key}: it has {what}", key=key)


class Fresh:
    """Makes values out of decoded ones. What was tied in the checkpoint is tied in what one `Fresh` makes.

    Args:
        scratch: the arrays.
        copy: whether the memory of *scratch* will be used for something else, so that tensors must
            not keep it.
        to_devices: whether tensors go to the type of device they were saved from.
    """

    def __init__(self, scratch: ScratchTensors, *, copy: bool, to_devices: bool) -> None:
        self.scratch = scratch
        self._copy = copy
        self._to_devices = to_devices
        self._bases: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._tensors: dict[tuple[StoredTensor, torch.device], torch.Tensor] = {}
        self._arrays: dict[str, Array] = {}

    def value(self, stored: Any, like: Any = None) -> Any:
        """*stored* with its tensors; containers are new ones.

        Args:
            stored: a decoded value.
            like: a live value of similar structure; tensors go to the devices of its tensors.
        """
        kind = type(stored)
        if kind is StoredTensor:
            return self._tensor(stored, like)
        if kind in (dict, OrderedDict):
            return self._dict(stored, like)
        if kind in (list, tuple):
            likes = like if type(like) is kind and len(like) == len(stored) else [None] * len(stored)
            return kind(self.value(part, part_like) for part, part_like in zip(stored, likes, strict=True))
        if kind is StoredArray:
            return self._array(stored)
        if kind is StoredQuantized:
            return self._quantized(stored, like)
        if kind is StoredCustom:
            return codec_by_name(stored.name).decode(self.value(stored.value))
        if kind is StoredOptimizer:
            return self.value(stored.standard(), like)
        return stored

    def source(self, stored: StoredTensor | StoredQuantized) -> torch.Tensor:
        """What to copy from into a live tensor: scratch memory where that will do."""
        if type(stored) is StoredTensor:
            return self.scratch.tensor(stored)
        quantized: torch.Tensor = self.value(stored)
        return quantized

    def _dict(self, stored: dict[Any, Any], like: Any) -> dict[Any, Any]:
        likes = like if isinstance(like, dict) else {}
        value = type(stored)((key, self.value(part, likes.get(key))) for key, part in stored.items())
        if hasattr(stored, "_metadata"):
            value._metadata = stored._metadata  # type: ignore[attr-defined]
        return value

    def _tensor(self, stored: StoredTensor, like: Any) -> torch.Tensor:
        device = self._device(stored, like)
        known = self._tensors.get((stored, device))
        if known is None:
            known = self._tensors[stored, device] = shaped(self._base(stored.key, stored.dtype, device), stored)
        return known

    def _device(self, stored: StoredTensor, like: Any) -> torch.device:
        if isinstance(like, torch.Tensor):
            return like.device
        return home(stored.device) if self._to_devices else _CPU

    def _base(self, key: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        known = self._bases.get((key, dtype, device))
        if known is None:
            scratch = self.scratch.base(key, dtype)
            known = owned_copy(scratch, device) if self._copy or device != scratch.device else scratch
            self._bases[key, dtype, device] = known
        return known

    def _array(self, stored: StoredArray) -> Array:
        known = self._arrays.get(stored.key)
        if known is None:
            scratch = self.scratch.array(stored)
            known = self._arrays[stored.key] = scratch.copy() if self._copy else scratch
        return known

    def _quantized(self, stored: StoredQuantized, like: Any) -> torch.Tensor:
        likely = like if isinstance(like, torch.Tensor) else None
        values = self._tensor(stored.values, likely)
        scale, zero_point = self.value(stored.scale, likely), self.value(stored.zero_point, likely)
        if stored.axis is not None:
            _check_channels(stored, values, scale, zero_point)
        try:
            if stored.axis is None:
                quantized = torch._make_per_tensor_quantized_tensor(values, scale, zero_point)
            else:
                quantized = torch._make_per_channel_quantized_tensor(values, scale, zero_point, stored.axis)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise _contradiction(stored.values.key, f"what torch cannot make {stored.dtype} of: {error}") from error
        if quantized.dtype is not stored.dtype:
            raise _contradiction(stored.values.key, f"{values.dtype}, not the integers of {stored.dtype}")
        return quantized


def _check_channels(
    stored: StoredQuantized, values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> None:
    # Torch looks at neither, and reads past the end of both.
    channels = values.shape[stored.axis : stored.axis + 1] if stored.axis is not None else ()
    if not channels or tuple(scale.shape) != tuple(channels) or tuple(zero_point.shape) != tuple(channels):
        raise _contradiction(stored.values.key, f"{list(values.shape)}, but {scale.numel()} scales along its channels")


def owned_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy with memory of its own."""
    if is_bytes_only(tensor.dtype):
        return tensor.view(torch.uint8).to(device, copy=True).view(tensor.dtype)
    return tensor.to(device, copy=True)
