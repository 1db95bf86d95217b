"""The data types that zarr-python learns from us: their names, scalars, fill values and entry points."""

from __future__ import annotations

import pickle
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.core.dtype.registry import DataTypeRegistry
from zarr.dtype import data_type_registry

from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.interop import register_zarr_dtypes
from asyncckpt.interop.zarr_dtypes import ZARR_DTYPES

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
DECLARED = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["zarr.data_type"]


@pytest.fixture(params=ZARR_DTYPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def data_type(name: str) -> Any:
    return ZARR_DTYPES[name]()


def test_every_type_that_numpy_lacks_is_there() -> None:
    assert set(ZARR_DTYPES) == {name for name in DATA_TYPES if hasattr(ml_dtypes, name)}


def test_entry_points_name_exactly_these_classes() -> None:
    loaded = {name: EntryPoint(name, value, "zarr.data_type").load() for name, value in DECLARED.items()}
    assert loaded == ZARR_DTYPES


def test_entry_points_are_what_the_registry_of_zarr_loads() -> None:
    """As for a program that never imports asyncckpt; zarr 3.1 collects entry points but never does this itself."""
    registry = DataTypeRegistry()
    registry._lazy_load_list.extend(EntryPoint(name, value, "zarr.data_type") for name, value in DECLARED.items())
    registry._lazy_load()
    assert registry.contents == ZARR_DTYPES


def test_registering_again_changes_nothing_and_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    register_zarr_dtypes()
    before = dict(data_type_registry.contents)
    register_zarr_dtypes()
    assert data_type_registry.contents == before
    other = type("Other", (), {})
    monkeypatch.setitem(data_type_registry.contents, "bfloat16", other)
    register_zarr_dtypes()
    assert data_type_registry.contents["bfloat16"] is other


def test_types_are_found_by_name_and_by_numpy_type(name: str, data_type: Any) -> None:
    native = np.dtype(getattr(ml_dtypes, name))
    assert data_type_registry.match_dtype(native) == data_type
    assert data_type_registry.match_json(name, zarr_format=3) == data_type
    assert data_type.to_native_dtype() == native
    assert data_type.item_size == native.itemsize
    assert data_type.to_json(zarr_format=3) == name
    assert pickle.loads(pickle.dumps(data_type)) == data_type


def test_other_types_are_not_taken_for_it(data_type: Any) -> None:
    with pytest.raises(ValueError, match="is not"):
        type(data_type).from_native_dtype(np.dtype("float32"))
    with pytest.raises(ValueError, match="is not"):
        type(data_type).from_json("float32", zarr_format=3)


def test_zarr_format_2_does_not_have_it(name: str, data_type: Any) -> None:
    with pytest.raises(ValueError, match="does not exist in Zarr format 2"):
        data_type.to_json(zarr_format=2)
    with pytest.raises(ValueError, match="does not exist in Zarr format 2"):
        type(data_type).from_json({"name": "|u1", "object_codec_id": None}, zarr_format=2)


def test_fill_values_keep_every_bit(name: str, data_type: Any) -> None:
    native = data_type.to_native_dtype()
    patterns = np.arange(2 ** (8 * native.itemsize), dtype=f"<u{native.itemsize}").view(native)
    for scalar in patterns[:: 1 if len(patterns) == 256 else 97]:
        text = data_type.to_json_scalar(scalar, zarr_format=3)
        assert data_type.from_json_scalar(text, zarr_format=3).tobytes() == scalar.tobytes()


def test_fill_values_may_be_numbers_names_or_bits(name: str, data_type: Any) -> None:
    read = data_type.from_json_scalar
    assert float(read(1, zarr_format=3)) == float(read(1.0, zarr_format=3)) == 1.0
    assert np.isnan(float(read("NaN", zarr_format=3)))
    assert read("0x00", zarr_format=3).tobytes() == bytes(data_type.item_size)
    assert data_type.default_scalar().tobytes() == bytes(data_type.item_size)
    for wrong in (None, [], "one", {"a": 1}, "0xzz", "0x" + "f" * 9, "0x-1"):
        with pytest.raises(TypeError, match="is not a fill value of"):
            read(wrong, zarr_format=3)


def test_only_numbers_become_scalars(data_type: Any) -> None:
    assert float(data_type.cast_scalar(np.float32(1))) == 1.0
    with pytest.raises(TypeError, match="cannot make a"):
        data_type.cast_scalar("one")


def test_zarr_python_writes_arrays_of_it(tmp_path: Path, name: str, data_type: Any) -> None:
    values = np.arange(256, dtype=np.uint8).repeat(data_type.item_size).view(data_type.to_native_dtype())
    array = zarr.create_array(tmp_path / "a", shape=values.shape, dtype=data_type, chunks=(100,))
    array[...] = values
    again: Any = zarr.open_array(tmp_path / "a", mode="r")
    assert again[...].tobytes() == values.tobytes()
    assert again.fill_value.tobytes() == bytes(data_type.item_size)
