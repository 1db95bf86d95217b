"""Layouts: files and chunks tile the raw bytes, and lie where zarr-python looks for them."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from zarr.core.metadata.v3 import ArrayV3Metadata

from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.layout import CHUNK_BYTES, SHARD_BYTES, ArrayLayout, FilePart, plan_layout
from asyncckpt.format.metadata import decode_array_metadata, encode_array_metadata
from asyncckpt.interop import register_zarr_dtypes

MiB = 2**20


def plan(shape: tuple[int, ...], name: str = "uint8", **limits: int) -> ArrayLayout:
    data_type = DATA_TYPES[name]
    return plan_layout(shape, data_type, resolve_codecs("none", data_type), **limits)


@st.composite
def layouts(draw: st.DrawFn, most_elements: int = 4000) -> ArrayLayout:
    """Small arrays under small limits: the same arithmetic as for large ones."""
    shape = tuple(draw(st.lists(st.integers(1, 13) | st.integers(1, 60), max_size=5)))
    assume(math.prod(shape) <= most_elements)
    name = draw(st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]))
    chunk_bytes = draw(st.integers(1, 600))
    return plan(shape, name, chunk_bytes=chunk_bytes, shard_bytes=chunk_bytes * draw(st.integers(1, 20)))


@given(layouts())
@settings(max_examples=300)
def test_files_and_chunks_tile_the_raw_bytes(layout: ArrayLayout) -> None:
    files = list(layout.files())
    assert (files[0].start, files[-1].stop) == (0, layout.num_bytes)
    assert all(one.stop == other.start for one, other in pairwise(files))
    assert len({file.key for file in files}) == len(files)
    for file in files:
        chunks = list(layout.chunks(file))
        assert (chunks[0][1], chunks[-1][2]) == (file.start, file.stop)
        assert all(one[2] == other[1] for one, other in pairwise(chunks))
        slots = [slot for slot, _, _ in chunks]
        assert slots == sorted(set(slots))
        assert slots[-1] < layout.chunks_per_shard
        assert all(0 < stop - start <= layout.chunk_bytes for _, start, stop in chunks)


@given(layouts(), st.data())
@settings(max_examples=300)
def test_sizes_are_bounded_and_balanced(layout: ArrayLayout, data: st.DataObject) -> None:
    chunk_bytes = data.draw(st.integers(16, 600))  # an element fits
    shard_bytes = chunk_bytes * data.draw(st.integers(1, 20))
    layout = plan_layout(
        layout.shape, layout.data_type, layout.codecs, chunk_bytes=chunk_bytes, shard_bytes=shard_bytes
    )
    if layout.num_bytes <= chunk_bytes:
        assert layout.shard_shape is None
        assert layout.chunk_shape == layout.shape
        return
    assert layout.chunk_bytes <= chunk_bytes
    assert layout.shard_shape is not None
    assert math.prod(layout.shard_shape) * layout.data_type.itemsize <= shard_bytes
    # No chunk is mostly padding: along the cut axis all are within one row of equally long, or within
    # as many as make a multiple of 8 elements.
    for length, chunk in zip(layout.shape, layout.chunk_shape, strict=True):
        assert chunk - -(-length // -(-length // chunk)) < 8


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((50257, 1600), "float32"),
        ((2, 300 * MiB), "uint8"),
        ((3_000_017,), "float64"),
        ((7, 5, 3_000_000), "bfloat16"),
        ((40_000, 1, 30_000), "float8_e5m2"),
        ((100_000_000, 16), "float32"),
        ((1, 1, 5_000_000), "complex128"),
        ((5 * MiB, 1, 1), "bool"),
    ],
)
def test_real_sizes(shape: tuple[int, ...], name: str) -> None:
    layout = plan(shape, name)
    assert layout.shard_shape is not None
    assert layout.chunk_bytes <= CHUNK_BYTES
    files = list(layout.files())
    assert files[-1].stop == layout.num_bytes == sum(file.stop - file.start for file in files)
    assert max(file.stop - file.start for file in files) <= SHARD_BYTES
    assert layout.chunks_per_shard * 16 < MiB


@pytest.mark.parametrize("shape", [(38_597_376,), (1_000_003,), (50_257, 7), (30_001, 2, 3), (999, 4097), (3, 70_001)])
def test_chunks_hold_multiples_of_8_elements(shape: tuple[int, ...]) -> None:
    # Of another number blosc leaves the last block unshuffled, and then it finds little to compress.
    layout = plan(shape, "float32", chunk_bytes=2**18)
    assert layout.shard_shape is not None
    assert math.prod(layout.chunk_shape) % 8 == 0


@pytest.mark.parametrize(("num_bytes", "is_sharded"), [(CHUNK_BYTES, False), (CHUNK_BYTES + 1, True)])
def test_only_arrays_above_4_mib_are_sharded(num_bytes: int, is_sharded: bool) -> None:
    layout = plan((num_bytes,))
    assert (layout.shard_shape is not None) == is_sharded
    assert [file.key for file in layout.files()] == ["c.0"]


def test_a_scalar_is_one_chunk_without_axes() -> None:
    layout = plan((), "complex128")
    assert (layout.chunk_shape, layout.shard_shape, layout.chunks_per_shard) == ((), None, 1)
    assert [(file.key, file.start, file.stop) for file in layout.files()] == [("c", 0, 16)]


@given(layouts(most_elements=600))
@settings(max_examples=100)
def test_zarr_python_finds_the_same_elements_in_the_same_files(layout: ArrayLayout) -> None:
    """Its own chunk grid says which region a file covers: that region is the file's run of raw bytes."""
    register_zarr_dtypes()
    metadata = ArrayV3Metadata.from_dict(json.loads(encode_array_metadata(layout, {})))
    numbers = np.arange(math.prod(layout.shape)).reshape(layout.shape)
    itemsize = layout.data_type.itemsize
    by_key = {file.key: file for file in layout.files()}
    grid = [-(-length // size) for length, size in zip(layout.shape, layout.file_shape, strict=True)]
    seen = set()
    for coordinates in np.ndindex(*grid):
        file = by_key[metadata.encode_chunk_key(coordinates)]
        seen.add(file.key)
        region = _region(numbers, coordinates, layout.file_shape)
        assert region.tolist() == list(range(file.start // itemsize, file.stop // itemsize))
        _compare_slots(layout, file, numbers, coordinates)
    assert seen == by_key.keys()


def _region(numbers: np.ndarray, coordinates: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    index = tuple(slice(at * length, (at + 1) * length) for at, length in zip(coordinates, size, strict=True))
    return numbers[index].ravel()


def _compare_slots(layout: ArrayLayout, file: FilePart, numbers: np.ndarray, coordinates: tuple[int, ...]) -> None:
    # The index of a shard is in C order of its chunks (sharding codec, version 1.0).
    per_shard = [shard // chunk for shard, chunk in zip(layout.file_shape, layout.chunk_shape, strict=True)]
    expected = {}
    for slot, inner in enumerate(np.ndindex(*per_shard)):
        at = tuple(c * n + i for c, n, i in zip(coordinates, per_shard, inner, strict=True))
        region = _region(numbers, at, layout.chunk_shape)
        if region.size:
            expected[slot] = region.tolist()
    itemsize = layout.data_type.itemsize
    found = {slot: list(range(start // itemsize, stop // itemsize)) for slot, start, stop in layout.chunks(file)}
    assert found == expected


@given(layouts())
@settings(max_examples=200)
def test_every_layout_survives_its_metadata(layout: ArrayLayout) -> None:
    found, attributes = decode_array_metadata(encode_array_metadata(layout, {"a": 1}))
    assert (found, attributes) == (layout, {"a": 1})
