"""Torch's data types by name, and which of them Zarr has."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from asyncckpt.format.dtypes import DATA_TYPES

__all__ = ["TORCH_DTYPES", "ZARR_NAMES", "is_bytes_only", "torch_name"]


def torch_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


# Aliases (torch.half, torch.double) have the same str, so each type has one name.
TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {torch_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
)
"""Every data type of the installed torch by name."""

ZARR_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in TORCH_DTYPES.items() if name in DATA_TYPES}
)
"""Zarr names of the types Zarr has; torch and Zarr call them the same."""


def is_bytes_only(dtype: torch.dtype) -> bool:
    """Whether torch may lack even a copy kernel for *dtype* (``uint4``, ``bits8``): move its bytes instead.

    All such types have elements of one byte, so ``view(torch.uint8)`` works for any strides.
    """
    return dtype.itemsize == 1 and dtype not in ZARR_NAMES
