"""The search for NaN and infinity agrees with ml_dtypes and numpy on every value of the small types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.model import TensorSpec
from asyncckpt.writer.finite import _BLOCK_BYTES, holds_non_finite, type_of_values

SMALL = ["float16", "bfloat16", *(name for name in DATA_TYPES if name.startswith("float8"))]
LARGE = {"float32": "f4", "float64": "f8", "complex64": "f4", "complex128": "f8"}


def bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.tobytes())


@pytest.mark.parametrize("name", SMALL)
def test_every_value_of_a_small_type_is_judged_as_ml_dtypes_does(name: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, name, name))
    integers = np.arange(256**kind.itemsize).astype(f"<u{kind.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs are values like any other here
        finite = np.isfinite(integers.view(kind))
    assert [holds_non_finite(bytes_of(one), name) for one in np.split(integers, len(integers))] == (~finite).tolist()
    # Among others, wherever it stands.
    assert not holds_non_finite(bytes_of(integers[finite]), name)
    for bad in integers[~finite][:4]:
        assert holds_non_finite(bytes_of(np.append(integers[finite], bad)), name)
        assert holds_non_finite(bytes_of(np.insert(integers[finite], 0, bad)), name)


@pytest.mark.parametrize("name", LARGE)
def test_large_types(name: str) -> None:
    kind = LARGE[name]
    limits = np.finfo(kind)
    good = np.array([0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny, -limits.smallest_subnormal], kind)
    assert not holds_non_finite(bytes_of(good), name)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        assert holds_non_finite(bytes_of(np.append(good, np.array([bad], kind))), name)


@pytest.mark.parametrize("position", [0, 1, -1])
def test_every_block_is_searched(position: int) -> None:
    values = np.ones(3 * _BLOCK_BYTES // 4 + 5, "f4")
    assert not holds_non_finite(bytes_of(values), "float32")
    values[position if position != 1 else _BLOCK_BYTES // 4] = np.nan
    assert holds_non_finite(bytes_of(values), "float32")


@pytest.mark.parametrize("name", ["bool", "int8", "uint8", "int64", "uint4", "bits8"])
def test_types_without_nan_hold_none(name: str) -> None:
    assert not holds_non_finite(memoryview(b"\xff" * 64), name)


@pytest.mark.parametrize("name", ["float32", "float8_e4m3fnuz"])
def test_nothing_is_finite(name: str) -> None:
    assert not holds_non_finite(memoryview(b""), name)


def test_values_that_zarr_has_no_type_for_count_as_what_torch_calls_them() -> None:
    spec = TensorSpec("state/c", "uint8", (4,), 0, "complex32")
    assert holds_non_finite(bytes_of(np.array([1.0, np.nan], "f2")), type_of_values(spec))
    assert not holds_non_finite(bytes_of(np.array([1.0, np.nan], "f2")), "uint8")
