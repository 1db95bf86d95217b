"""Tells whether staged bytes hold NaN or infinity, without torch and without a copy.

In every IEEE-like type the values that are not finite are those of the largest exponent: read as integers, the
largest of all but for the sign. So two reductions decide: the maximum as signed integers finds positive ones, the
maximum as unsigned integers negative ones. ``docs/decisions/023-non-finite-and-stale.md`` has what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asyncckpt.model import TensorSpec

__all__ = ["holds_non_finite", "type_of_values"]

_BLOCK_BYTES = 1 * 2**20  # both reductions of a block read it from the cache


@dataclass(frozen=True, slots=True)
class _Exponent:
    """Which integers stand for values that are not finite.

    Attributes:
        bits: size of an element.
        positive: the least of them with the sign bit clear.
        negative: the least of them with the sign bit set, as an unsigned integer.
    """

    bits: int
    positive: int
    negative: int


def _ieee(bits: int, infinity: int) -> _Exponent:
    return _Exponent(bits, infinity, infinity | 1 << (bits - 1))


_EXPONENTS = {
    "float16": _ieee(16, 0x7C00),
    "bfloat16": _ieee(16, 0x7F80),
    "float32": _ieee(32, 0x7F80_0000),
    "float64": _ieee(64, 0x7FF0_0000_0000_0000),
    "complex32": _ieee(16, 0x7C00),
    "complex64": _ieee(32, 0x7F80_0000),
    "complex128": _ieee(64, 0x7FF0_0000_0000_0000),
    "float8_e3m4": _ieee(8, 0x70),
    "float8_e4m3": _ieee(8, 0x78),
    "float8_e4m3fn": _ieee(8, 0x7F),  # no infinity, one NaN for each sign
    "float8_e5m2": _ieee(8, 0x7C),
    "float8_e8m0fnu": _Exponent(8, 0x80, 0xFF),  # no sign
}
# Their only value that is not finite is NaN in the place of a negative zero: the least signed integer.
_NEGATIVE_ZERO_IS_NAN = frozenset({"float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"})


def type_of_values(spec: TensorSpec) -> str:
    """The type whose values *spec* holds: torch's, where Zarr has none for it."""
    return spec.torch_dtype or spec.data_type


def holds_non_finite(raw: memoryview, data_type: str) -> bool:
    """Whether any element is NaN or infinite; False for integers and other types that know neither.

    Args:
        raw: whole elements, little endian.
        data_type: see `type_of_values`.
    """
    exponent = _EXPONENTS.get(data_type)
    if exponent is None and data_type not in _NEGATIVE_ZERO_IS_NAN:
        return False
    for start in range(0, len(raw), _BLOCK_BYTES):
        block = raw[start : start + _BLOCK_BYTES]
        if exponent is None:
            if np.frombuffer(block, "i1").min() == -0x80:
                return True
        elif (
            np.frombuffer(block, f"<i{exponent.bits // 8}").max() >= exponent.positive
            or np.frombuffer(block, f"<u{exponent.bits // 8}").max() >= exponent.negative
        ):
            return True
    return False
