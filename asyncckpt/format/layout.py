"""How the elements of one tensor are cut into chunks and files. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from asyncckpt.format.dtypes import DataType

__all__ = ["CACHED_CHUNK_BYTES", "CHUNK_BYTES", "INLINE_BYTES", "SHARD_BYTES", "ArrayLayout", "FilePart", "plan_layout"]

CHUNK_BYTES = 4 * 2**20
"""Raw bytes of a chunk, at most, where one pass over it is most of the work."""

CACHED_CHUNK_BYTES = 256 * 2**10
"""The same for codecs as fast as memory: what follows the first pass over it stays in a core's own cache."""

SHARD_BYTES = 256 * 2**20
INLINE_BYTES = 512

_SHUFFLED_ELEMENTS = 8
_MORE_PARTS = 16

Shape = tuple[int, ...]
CodecJson = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FilePart:
    """One chunk or shard file.

    Attributes:
        key: its name beside the array's ``zarr.json``, ``c.0.0``.
        start: first byte of the raw array (C order) it holds; ``stop`` is one past its last.
    """

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Chunks and files of one array.

    The array is cut along one axis, the *cut axis*; every axis before it has chunk length 1 and every
    axis after it is whole. So each chunk and each file holds one contiguous run of the raw bytes.

    Attributes:
        shape: global shape.
        data_type: element type.
        chunk_shape: inner chunks (of shards) or chunks.
        shard_shape: chunks of the grid when sharded, else None; a multiple of ``chunk_shape``.
        codecs: codec chain of the (inner) chunks, Zarr v3 JSON.
    """

    shape: Shape
    data_type: DataType
    chunk_shape: Shape
    shard_shape: Shape | None
    codecs: tuple[CodecJson, ...]

    @property
    def num_bytes(self) -> int:
        """Raw bytes of the array."""
        return math.prod(self.shape) * self.data_type.itemsize

    @property
    def file_shape(self) -> Shape:
        """Elements of one file: a shard, or a chunk when not sharded."""
        return self.shard_shape or self.chunk_shape

    @property
    def chunk_bytes(self) -> int:
        """Raw bytes of one full chunk."""
        return math.prod(self.chunk_shape) * self.data_type.itemsize

    @property
    def chunks_per_shard(self) -> int:
        """Entries of a shard's index; 1 when not sharded."""
        return math.prod(self.file_shape) // math.prod(self.chunk_shape)

    @property
    def num_files(self) -> int:
        """Files of the array."""
        return math.prod(_grid(self.shape, self.file_shape))

    @property
    def file_bytes(self) -> int:
        """Raw bytes of one full file."""
        return math.prod(self.file_shape) * self.data_type.itemsize

    @property
    def max_stored_bytes(self) -> int:
        """More than a file of this array can have: what codecs add to incompressible chunks is far less."""
        return self.file_bytes + self.file_bytes // 16 + self.chunks_per_shard * 1024 + 1024

    def files(self) -> Iterator[FilePart]:
        """Every file, in the order of the raw bytes."""
        if self.file_shape == self.shape:
            yield FilePart("c" + ".0" * len(self.shape), 0, self.num_bytes)
            return
        grid = _grid(self.shape, self.file_shape)
        axis = _cut_axis(self.file_shape)
        row = math.prod(self.shape[axis:]) * self.data_type.itemsize
        # Not the size of a full file: one that covers an axis may be padded along it.
        step = self.file_shape[axis] * math.prod(self.shape[axis + 1 :]) * self.data_type.itemsize
        per_row = grid[axis]
        for number in range(math.prod(grid)):
            outer, inner = divmod(number, per_row)
            start = outer * row + inner * step
            yield FilePart(_chunk_key(number, grid), start, min(start + step, (outer + 1) * row))

    def chunks(self, part: FilePart) -> Iterator[tuple[int, int, int]]:
        """``(slot, start, stop)`` of each chunk of *part*: its place in the shard index, its raw bytes."""
        if self.shard_shape is None:
            yield 0, part.start, part.stop
            return
        axis = _cut_axis(self.chunk_shape)
        row = math.prod(self.shape[axis:]) * self.data_type.itemsize
        slots_per_row = self.shard_shape[axis] // self.chunk_shape[axis]
        start = part.start
        slot = 0
        while start < part.stop:
            row_stop = min((start // row + 1) * row, part.stop)
            slot_in_row = 0
            while start < row_stop:
                stop = min(start + self.chunk_bytes, row_stop)
                yield slot + slot_in_row, start, stop
                start = stop
                slot_in_row += 1
            slot += slots_per_row


def plan_layout(
    shape: Shape,
    data_type: DataType,
    codecs: tuple[CodecJson, ...],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> ArrayLayout:
    """Choose chunks of about *chunk_bytes*, and shards of at most about *shard_bytes*, for a tensor.

    Chunks are balanced: about as many as needed, each as small as that allows, so that padding is minimal.

    Args:
        shape: shape of a tensor that is not empty.
        data_type: its element type.
        codecs: codec chain for its chunks.
        chunk_bytes: a tensor up to this size is a single chunk.
        shard_bytes: size at which a further file is begun.
    """
    chunk_shape, shard_shape = _plan_shapes(tuple(shape), data_type.itemsize, chunk_bytes, shard_bytes)
    return ArrayLayout(tuple(shape), data_type, chunk_shape, shard_shape, codecs)


@lru_cache(maxsize=4096)
def _plan_shapes(shape: Shape, itemsize: int, chunk_bytes: int, shard_bytes: int) -> tuple[Shape, Shape | None]:
    if not shape:
        return (), None
    if math.prod(shape) * itemsize <= chunk_bytes:
        return shape, None
    axis = next(
        (axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) * itemsize <= chunk_bytes),
        len(shape) - 1,
    )
    row = math.prod(shape[axis + 1 :]) * itemsize
    # blosc cannot bitshuffle, and so hardly compresses, a number of elements that is no multiple of 8.
    unit = _SHUFFLED_ELEMENTS // math.gcd(_SHUFFLED_ELEMENTS, math.prod(shape[axis + 1 :]))
    length = _least_padded(shape[axis], max(1, chunk_bytes // row), unit)
    ones = (1,) * axis
    chunk_shape = (*ones, length, *shape[axis + 1 :])
    num_chunks = -(-shape[axis] // length)
    per_shard = max(1, shard_bytes // (length * row))
    if num_chunks > per_shard or axis == 0:
        per_shard = _balanced(num_chunks, per_shard)
        return chunk_shape, (*ones, per_shard * length, *shape[axis + 1 :])
    # A whole row of the cut axis fits a shard: let a shard hold several of them.
    rows = _balanced(shape[axis - 1], max(1, shard_bytes // (num_chunks * length * row)))
    return chunk_shape, (*ones[:-1], rows, num_chunks * length, *shape[axis + 1 :])


def _balanced(total: int, most: int) -> int:
    """Length of equal parts of *total*, none longer than *most*."""
    parts = -(-total // most)
    return -(-total // parts)


def _least_padded(total: int, most: int, unit: int) -> int:
    """Length of equal parts of *total*, none longer than *most*; a multiple of *unit* where that is possible.

    The last part is padded to that length. A few more and shorter parts than needed often need no padding.
    """
    if most < unit or total < unit:
        unit = 1
    fewest = -(-total // (most - most % unit))
    lengths = (-(-total // parts // unit) * unit for parts in range(fewest, fewest + min(fewest, _MORE_PARTS)))
    return min(lengths, key=lambda length: -total % length)  # of equal ones the first, and longest


def _grid(shape: Shape, file_shape: Shape) -> Shape:
    return tuple(-(-length // size) for length, size in zip(shape, file_shape, strict=True))


def _cut_axis(cut_shape: Shape) -> int:
    """First axis along which a cut is not of length 1."""
    return next((axis for axis, length in enumerate(cut_shape) if length != 1), len(cut_shape) - 1)


def _chunk_key(number: int, grid: Shape) -> str:
    indices: list[int] = []
    for length in reversed(grid):
        number, index = divmod(number, length)
        indices.append(index)
    return ".".join(["c", *map(str, reversed(indices))])
