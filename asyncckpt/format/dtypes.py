"""Zarr data types a tensor may have, and how their elements look to the codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["DATA_TYPES", "DataType"]


@dataclass(frozen=True, slots=True)
class DataType:
    """One data type.

    Attributes:
        name: Zarr v3 name (core specification, or zarr-extensions for bfloat16 and float8).
        itemsize: bytes per element.
        numpy: storage type; ``<u2`` for bfloat16 and ``|u1`` for float8, which numpy lacks.
        fill_value: its JSON form for zero.
    """

    name: str
    itemsize: int
    numpy: np.dtype[Any]
    fill_value: Any

    @property
    def has_endianness(self) -> bool:
        """Whether the ``bytes`` codec must name a byte order."""
        return self.itemsize > 1


def _data_type(name: str, numpy: str, fill_value: Any) -> tuple[str, DataType]:
    dtype = np.dtype(numpy)
    return name, DataType(name, dtype.itemsize, dtype, fill_value)


_FLOAT8 = (
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip

DATA_TYPES: Mapping[str, DataType] = MappingProxyType(
    dict(
        [
            _data_type("bool", "|b1", False),
            *(_data_type(f"int{bits}", f"<i{bits // 8}", 0) for bits in (8, 16, 32, 64)),
            *(_data_type(f"uint{bits}", f"<u{bits // 8}", 0) for bits in (8, 16, 32, 64)),
            *(_data_type(f"float{bits}", f"<f{bits // 8}", 0.0) for bits in (16, 32, 64)),
            _data_type("complex64", "<c8", (0.0, 0.0)),
            _data_type("complex128", "<c16", (0.0, 0.0)),
            _data_type("bfloat16", "<u2", 0.0),
            *(_data_type(name, "|u1", "0x00") for name in _FLOAT8),
        ]
    )
)
