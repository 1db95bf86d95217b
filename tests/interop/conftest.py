"""One real step per preset, with every data type, in every size that is stored in a way of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import asyncckpt as ac
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.paths import join_key

TORCH_TYPES = [name for name in DATA_TYPES if hasattr(torch, name)]
"""Zarr names of what torch has too. Of float8 it lacks three, see `test_types_torch_lacks.py`."""

NAMES = ["weight", "h.0.attn", "a/b", "c", "c.0", ".", "__x", "zarr.json", "", "ünï", "50%", "x" * 300]
"""Names of one small tensor each, nearly all of which need escapes."""


@dataclass(frozen=True)
class Saved:
    """A committed step and the exact bytes that its arrays must have.

    Attributes:
        root: the checkpoint root.
        path: the step.
        arrays: shape, data type and C order little endian bytes by key.
    """

    root: Path
    path: Path
    arrays: Mapping[str, tuple[tuple[int, ...], str, bytes]]


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """All bit patterns, NaN payloads and negative zeros included."""
    dtype = getattr(torch, name)
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, count, np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def numpy_type(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def _tensors() -> dict[str, dict[str, torch.Tensor]]:
    sharded = 4 * 2**20 + 12_345
    large = {
        "float32": (1100, 1000),
        "bfloat16": (2, 3, 700_001),
        "float8_e5m2": (sharded,),
        "complex128": (5, 60_001),
        "bool": (sharded // 7, 8),
    }
    return {
        "small": {name: random_tensor(name, (33, 17), seed) for seed, name in enumerate(TORCH_TYPES)},
        "large": {name: random_tensor(name, shape, 100) for name, shape in large.items()},
        "zeros": {"weight": torch.zeros(1_200_000)},
        "names": {name: random_tensor("int16", (300,), seed) for seed, name in enumerate(NAMES)},
        "inline": {name: random_tensor(name, (2, 3), 7) for name in TORCH_TYPES},
    }


@pytest.fixture(scope="session", params=["fast", "small", "none"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The step as its writer process left it."""
    root = tmp_path_factory.mktemp(f"interop-{request.param}")
    tensors = _tensors()
    with ac.Checkpointer(root, tensors, compression=request.param, writer=ac.Writer(threads=1)) as ckpt:
        info = ckpt.save(7).result(timeout=100)
    arrays = {
        join_key(["state", item, name]): (tuple(tensor.shape), str(tensor.dtype)[len("torch.") :], bytes_of(tensor))
        for item, below in tensors.items()
        if item != "inline"
        for name, tensor in below.items()
    }
    return Saved(root, Path(info.path), arrays)


Compare = Callable[[str, np.ndarray], None]


@pytest.fixture
def compare(saved: Saved) -> Compare:
    """Fail unless an array read by another library is, bit for bit, the one saved under a key."""

    def compare(key: str, found: np.ndarray) -> None:
        shape, name, data = saved.arrays[key]
        assert found.shape == shape
        assert found.dtype == numpy_type(name)
        assert np.ascontiguousarray(found).tobytes() == data

    return compare
