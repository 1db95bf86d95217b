"""TensorStore reads every tensor bit for bit, but for the one data type it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ts = pytest.importorskip("tensorstore")

TENSORSTORE_LACKS = {"float8_e4m3"}
"""Data types of format 1 that TensorStore 0.1.86 does not have; none of them is a torch type."""


def read(path: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    found: np.ndarray = ts.open(spec, read=True, open=True).result().read().result()
    return found


def test_every_array_is_read_bit_for_bit(saved: Any, compare: Any) -> None:
    for key, (_, name, _) in saved.arrays.items():
        assert name not in TENSORSTORE_LACKS
        compare(key, read(saved.path / key))


def test_the_index_of_the_step_is_an_array_too(saved: Any) -> None:
    assert read(saved.path / "index/rank-00000").tobytes().startswith(b'[["state/')
