"""``zarr.json`` of arrays and groups: as zarr-python writes it, and nothing else is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.layout import plan_layout
from asyncckpt.format.metadata import decode_array_metadata, encode_array_metadata, encode_group_metadata
from asyncckpt.interop import register_zarr_dtypes

register_zarr_dtypes()


def document(shape: tuple[int, ...] = (100,), name: str = "float32", chunk_bytes: int = 160, **options: Any) -> Any:
    data_type = DATA_TYPES[name]
    codecs = resolve_codecs(options.pop("compression", "fast"), data_type)
    layout = plan_layout(shape, data_type, codecs, chunk_bytes=chunk_bytes, shard_bytes=4 * chunk_bytes)
    return json.loads(encode_array_metadata(layout, options))


@pytest.mark.parametrize("compression", ["fast", "small", "none", [{"name": "bytes"}, {"name": "zstd"}]])
@pytest.mark.parametrize("name", DATA_TYPES)
@pytest.mark.parametrize("shape", [(), (10,), (7, 90)])
def test_zarr_python_writes_the_same_metadata(compression: Any, name: str, shape: tuple[int, ...]) -> None:
    ours = document(shape, name, compression=compression, asyncckpt={"torch_dtype": "x"})
    theirs = json.loads(json.dumps(ArrayV3Metadata.from_dict(ours).to_dict()))
    theirs.pop("storage_transformers")
    if name.startswith("float8"):  # 0x00, spelt as a number there
        assert theirs.pop("fill_value") in ("0x00", 0.0)
        ours.pop("fill_value")
    assert theirs == ours


@pytest.mark.parametrize("attributes", [None, {}, {"a": [1, "x"]}])
def test_groups_are_groups_for_zarr_python(attributes: Any) -> None:
    found = GroupMetadata.from_dict(json.loads(encode_group_metadata(attributes)))
    assert found.zarr_format == 3
    assert found.attributes == (attributes or {})
    assert found.consolidated_metadata is None


def test_every_data_type_fills_with_zero_bits() -> None:
    for name in DATA_TYPES:
        found = ArrayV3Metadata.from_dict(document((10,), name))
        assert not any(bytes(memoryview(found.fill_value.tobytes())))
        assert found.data_type.to_native_dtype().itemsize == DATA_TYPES[name].itemsize


# -- what is refused -------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def put(*path: Any) -> Change:
    """Replace what is at *path* but its last element by that."""

    def change(tree: Any) -> None:
        *steps, name, value = path
        for step in steps:
            tree = tree[step]
        tree[name] = value

    return change


def drop(*path: Any) -> Change:
    def change(tree: Any) -> None:
        *steps, name = path
        for step in steps:
            tree = tree[step]
        del tree[name]

    return change


SHARDING = ("codecs", 0, "configuration")
MEMBERS = ["zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
           "attributes"]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        *map(drop, MEMBERS),
        *(put(name, None) for name in MEMBERS if name != "fill_value"),
        put("storage_transformers", []),
        put("zarr_format", 2),
        put("node_type", "group"),
        put("shape", [0]),
        put("shape", [-100]),
        put("shape", [100.0]),
        put("shape", [True]),
        put("shape", [100, 1]),
        put("shape", [2**60]),
        put("shape", [10**30]),
        put("data_type", "float31"),
        put("data_type", "string"),
        put("fill_value", 1.0),
        put("fill_value", "NaN"),
        put("chunk_grid", "name", "rectangular"),
        put("chunk_grid", "configuration", {}),
        put("chunk_grid", "configuration", "chunk_shape", 100),
        put("chunk_grid", "configuration", "chunk_shape", [0]),
        put("chunk_grid", "configuration", "chunk_shape", [True]),
        put("chunk_grid", "configuration", "chunk_shape", [104, 1]),
        put("chunk_grid", "configuration", "chunk_shape", [136]),  # longer than the array needs
        put("chunk_grid", "configuration", "chunk_shape", [101]),  # not a multiple of the chunks
        put("chunk_grid", "configuration", "chunk_shape", [2**70]),
        put("chunk_key_encoding", "name", "v2"),
        put("chunk_key_encoding", "configuration", "separator", "/"),
        put("codecs", []),
        put("codecs", ["bytes"]),
        put("codecs", [{"name": "bytes"}]),
        lambda tree: tree["codecs"].append({"name": "crc32c"}),
        put("codecs", 0, {"name": "sharding_indexed"}),
        put("codecs", 0, "configuration", None),
        put("codecs", 0, "configuration", "chunk_shape"),
        *(drop(*SHARDING, name) for name in ("chunk_shape", "codecs", "index_codecs", "index_location")),
        put(*SHARDING, "index_location", "start"),
        put(*SHARDING, "index_codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        put(*SHARDING, "chunk_shape", [33]),
        put(*SHARDING, "chunk_shape", []),
        put(*SHARDING, "codecs", []),
        put(*SHARDING, "codecs", 5),
        put(*SHARDING, "codecs", ["bytes"]),
        put(*SHARDING, "codecs", 0, [1]),
        put(*SHARDING, "codecs", 1, "name", {"a": 1}),
        put(*SHARDING, "codecs", 1, "configuration", "clevel", 77),
    ],
)
def test_metadata_that_format_1_does_not_have_is_refused(change: Change) -> None:
    valid = document()
    assert valid["codecs"][0]["name"] == "sharding_indexed"
    decode_array_metadata(json.dumps(valid).encode())
    change(valid)
    with pytest.raises(CorruptCheckpointError, match="array metadata is malformed"):
        decode_array_metadata(json.dumps(valid).encode())


@pytest.mark.parametrize(
    ("shape", "chunk", "shard"),
    [
        ([4, 6], [2, 3], [4, 6]),  # not contiguous
        ([4, 6], [1, 3], [4, 3]),
        ([4, 6], [1, 6], [4, 12]),
        ([4, 2, 6], [1, 1, 3], [4, 4, 6]),  # room for rows that do not exist
        ([4, 6], [1, 12], [1, 12]),  # padding that nobody needs
        ([4], [8], [8]),
    ],
)
def test_chunks_that_no_plan_has_are_refused(shape: list[int], chunk: list[int], shard: list[int]) -> None:
    changed = document()
    changed["shape"] = shape
    changed["codecs"][0]["configuration"]["chunk_shape"] = chunk
    changed["chunk_grid"]["configuration"]["chunk_shape"] = shard
    with pytest.raises(CorruptCheckpointError, match="chunks that format 1 does not have"):
        decode_array_metadata(json.dumps(changed).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"zarr_format":3}'])
def test_what_is_no_metadata_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="array metadata is malformed"):
        decode_array_metadata(data)


def test_limits() -> None:
    with pytest.raises(CorruptCheckpointError, match="over the limit"):
        decode_array_metadata(b" " * (2**20 + 1))
    valid = document(compression="none")
    for dimensions, is_valid in ((64, True), (65, False)):
        ones = [1] * dimensions
        valid["shape"] = valid["chunk_grid"]["configuration"]["chunk_shape"] = ones
        valid["codecs"][0]["configuration"]["chunk_shape"] = ones
        if is_valid:
            assert decode_array_metadata(json.dumps(valid).encode())[0].shape == (1,) * 64
        else:
            with pytest.raises(CorruptCheckpointError, match="a shape that format 1 does not have"):
                decode_array_metadata(json.dumps(valid).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_other_json_in_any_place_is_refused_or_read(data: st.DataObject) -> None:
    tree: Any = document()
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    try:
        decode_array_metadata(json.dumps(tree).encode())
    except CorruptCheckpointError as error:
        assert "array metadata is malformed" in error.message  # noqa: PT017
