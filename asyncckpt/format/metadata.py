"""``zarr.json`` of arrays and groups, written and read by the Zarr v3 specification."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.codecs import check_codecs
from asyncckpt.format.dtypes import DATA_TYPES, DataType
from asyncckpt.format.json_text import refuse_duplicates
from asyncckpt.format.layout import ArrayLayout, Shape
from asyncckpt.format.limits import (
    MAX_ARRAY_BYTES,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS_PER_SHARD,
    MAX_CODECS,
    MAX_DIMENSIONS,
    MAX_FILE_BYTES,
    MAX_METADATA_BYTES,
)

__all__ = ["decode_array_metadata", "encode_array_metadata", "encode_group_metadata"]

_INDEX_CODECS = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"})
_REPEATED_BYTES = 4096
_CHUNK_KEYS = {"name": "default", "configuration": {"separator": "."}}


def encode_array_metadata(layout: ArrayLayout, attributes: Mapping[str, Any]) -> bytes:
    """The ``zarr.json`` of an array."""
    head = _encode_head(layout.shape, layout.data_type.name, layout.file_shape, layout.chunk_shape, _codec_json(layout))
    return head + msgspec.json.encode(attributes) + b"}"


@lru_cache(maxsize=4096)
def _encode_head(shape: Shape, name: str, file_shape: Shape, chunk_shape: Shape, codecs: str) -> bytes:
    encoded = msgspec.json.encode(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file_shape}},
            "chunk_key_encoding": _CHUNK_KEYS,
            "fill_value": DATA_TYPES[name].fill_value,
            "codecs": msgspec.Raw(codecs.encode()),
        }
    )
    return encoded[:-1] + b',"attributes":'


def _codec_json(layout: ArrayLayout) -> str:
    inner = list(layout.codecs)
    if layout.shard_shape is None:
        return msgspec.json.encode(inner).decode()
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": layout.chunk_shape,
            "codecs": inner,
            "index_codecs": _INDEX_CODECS,
            "index_location": "end",
        },
    }
    return msgspec.json.encode([sharding]).decode()


@lru_cache(maxsize=1)
def _empty_group() -> bytes:
    return msgspec.json.encode({"zarr_format": 3, "node_type": "group", "attributes": {}})


def encode_group_metadata(attributes: Mapping[str, Any] | None = None) -> bytes:
    """The ``zarr.json`` of a group below the step."""
    if not attributes:
        return _empty_group()
    return msgspec.json.encode({"zarr_format": 3, "node_type": "group", "attributes": attributes})


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    configuration: dict[str, Any]


class _Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    zarr_format: int
    node_type: str
    shape: tuple[int, ...]
    data_type: str
    chunk_grid: _Named
    chunk_key_encoding: _Named
    fill_value: Any
    codecs: list[dict[str, Any]]
    attributes: dict[str, Any]


_decode = msgspec.json.Decoder(_Array).decode


def decode_array_metadata(data: bytes) -> tuple[ArrayLayout, dict[str, Any]]:
    """Layout and attributes in an array's ``zarr.json``; accepts what format 1 allows and nothing else.

    Raises:
        CorruptCheckpointError: it is not such a file.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise CorruptCheckpointError(f"array metadata of {len(data)} bytes is over the limit of {MAX_METADATA_BYTES}")
    # The layers of a model, and the moments of its parameters, have the same few shapes over and over.
    layout, attributes = (_decode_repeated if len(data) <= _REPEATED_BYTES else _decode_once)(data)
    return layout, dict(attributes)


def _decode_once(data: bytes) -> tuple[ArrayLayout, dict[str, Any]]:
    try:
        found = _decode(data)
        layout = _layout(found)
        refuse_duplicates(data, encode_array_metadata(layout, found.attributes))
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"array metadata is malformed: {str(error)[:500]}") from error
    return layout, found.attributes


_decode_repeated = lru_cache(maxsize=1024)(_decode_once)


def _layout(found: _Array) -> ArrayLayout:
    if found.zarr_format != 3 or found.node_type != "array":
        raise ValueError("not a Zarr v3 array")
    if found.chunk_grid.name != "regular" or found.chunk_key_encoding != _Named("default", {"separator": "."}):
        raise ValueError("a chunk grid or key encoding that format 1 does not have")
    data_type = DATA_TYPES[found.data_type]
    if msgspec.json.encode(found.fill_value) != msgspec.json.encode(data_type.fill_value):
        raise ValueError("a fill value that is not zero")
    file_shape = _shape(found.chunk_grid.configuration["chunk_shape"], len(found.shape))
    if found.codecs and found.codecs[0].get("name") == "sharding_indexed":
        return _sharded(found, data_type, file_shape)
    check_codecs(list(found.codecs), data_type)
    return _checked(ArrayLayout(found.shape, data_type, file_shape, None, tuple(found.codecs)))


def _sharded(found: _Array, data_type: DataType, shard_shape: Shape) -> ArrayLayout:
    (sharding,) = found.codecs
    configuration = sharding["configuration"]
    if tuple(configuration["index_codecs"]) != _INDEX_CODECS or configuration["index_location"] != "end":
        raise ValueError("a shard index that format 1 does not have")
    chunk_shape = _shape(configuration["chunk_shape"], len(found.shape))
    if any(shard % chunk for shard, chunk in zip(shard_shape, chunk_shape, strict=True)):
        raise ValueError("chunks do not divide their shard")
    check_codecs(list(configuration["codecs"]), data_type)
    return _checked(ArrayLayout(found.shape, data_type, chunk_shape, shard_shape, tuple(configuration["codecs"])))


def _shape(value: Any, dimensions: int) -> Shape:
    if (
        not isinstance(value, list)
        or len(value) != dimensions
        or any(type(length) is not int or length < 1 for length in value)
    ):
        raise ValueError("a chunk shape is a list of positive numbers, one per dimension")
    return tuple(value)


def _checked(layout: ArrayLayout) -> ArrayLayout:
    if len(layout.shape) > MAX_DIMENSIONS or any(length < 1 for length in layout.shape):
        raise ValueError("a shape that format 1 does not have")
    if layout.num_bytes > MAX_ARRAY_BYTES or layout.file_bytes > MAX_FILE_BYTES:
        raise ValueError("an array larger than any memory, or files over the limit")
    if layout.chunk_bytes > MAX_CHUNK_BYTES or layout.chunks_per_shard > MAX_CHUNKS_PER_SHARD:
        raise ValueError("chunks over the limit, or too many of them in a shard")
    if len(layout.codecs) > MAX_CODECS:
        raise ValueError(f"more than {MAX_CODECS} codecs")
    if not _is_planned(layout):
        raise ValueError("chunks that format 1 does not have")
    return layout


def _is_planned(layout: ArrayLayout) -> bool:
    """Whether chunks and shards are contiguous and no longer than the array needs.

    So a hostile file cannot make a reader allocate more than the size of the array and its own.
    """
    padded = _padded(layout.shape, layout.chunk_shape)
    return _is_cut(layout.chunk_shape, layout.shape) and (
        layout.shard_shape is None or _is_cut(layout.shard_shape, padded)
    )


def _padded(shape: Shape, chunk_shape: Shape) -> Shape:
    return tuple(-(-length // chunk) * chunk for length, chunk in zip(shape, chunk_shape, strict=True))


def _is_cut(cut: Shape, whole: Shape) -> bool:
    """Whether *cut* has length 1 before some axis, at most all of it, and all of the axes after it."""
    axis = next((axis for axis, length in enumerate(cut) if length != 1), len(cut) - 1)
    return cut[axis : axis + 1] <= whole[axis : axis + 1] and cut[axis + 1 :] == whole[axis + 1 :]
