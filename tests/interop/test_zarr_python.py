"""zarr-python, with its own codecs and with the Rust ones of zarrs, reads every tensor bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import asyncckpt as ac

PIPELINES = {"zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}

ZARRS_LACKS = {"float8_e4m3fn"}
"""The data type that the Python side of zarrs 0.2 refuses; it warns, and zarr-python's own codecs take over."""


@pytest.fixture(params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "zarrs":
        pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": PIPELINES[request.param]}):
        yield request.param


def test_every_array_is_read_bit_for_bit(saved: Any, compare: Any, pipeline: str) -> None:
    group = ac.open_zarr(saved.root)
    for key, (_, name, _) in saved.arrays.items():
        if pipeline == "zarrs" and name in ZARRS_LACKS:
            with pytest.raises(UserWarning, match=f"data type {name} is not supported"):
                group[key]
        else:
            compare(key, np.asarray(group[key][...]))


def test_members_are_exactly_what_was_saved_without_a_warning(saved: Any) -> None:
    group = zarr.open_group(saved.path, mode="r")
    found = dict(group.members(max_depth=None))
    arrays = {key for key, node in found.items() if isinstance(node, zarr.Array)}
    assert arrays == {*saved.arrays, "index/rank-00000"}
    assert set(found) - arrays == {
        "state",
        "index",
        *(f"state/{name}" for name in ("small", "large", "zeros", "names")),
    }
    assert group.metadata.consolidated_metadata is None


def test_every_file_belongs_to_the_hierarchy(saved: Any) -> None:
    group = zarr.open_group(saved.path, mode="r")
    expected = {"zarr.json"}
    for key, node in group.members(max_depth=None):
        expected.add(f"{key}/zarr.json")
        if isinstance(node, zarr.Array):
            grid = [-(-length // size) for length, size in zip(node.shape, node.shards or node.chunks, strict=True)]
            expected |= {f"{key}/{node.metadata.encode_chunk_key(at)}" for at in np.ndindex(*grid)}
    found = {str(path.relative_to(saved.path)) for path in saved.path.rglob("*") if path.is_file()}
    assert found == expected


def test_attributes_say_what_a_key_cannot(saved: Any) -> None:
    group = ac.open_zarr(saved.root, 7)
    assert group.attrs["asyncckpt"]["step"] == 7
    names = [key for key in saved.arrays if key.startswith("state/names/")]
    tree: Any = group.attrs["asyncckpt"]["tree"]
    assert {node["key"] for node in tree["names"].values()} == set(names)


def test_the_group_is_read_only(saved: Any) -> None:
    group = ac.open_zarr(saved.root)
    with pytest.raises(ValueError, match="read-only"):
        group["state/small/float32"][0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        group.create_group("more")


@pytest.mark.parametrize(
    ("key", "selection"),
    [
        ("state/large/float32", np.s_[500:503]),
        ("state/large/float32", np.s_[1099, ::7]),
        ("state/large/bfloat16", np.s_[1, 2, 700_000]),
        ("state/large/complex128", np.s_[3:, -5:]),
        ("state/large/float8_e5m2", np.s_[-12_400:]),
    ],
)
def test_slices_are_the_slices_of_the_whole(saved: Any, pipeline: str, key: str, selection: Any) -> None:
    array: Any = ac.open_zarr(saved.root)[key]
    whole, part = np.asarray(array[...]), np.asarray(array[selection])
    assert part.tobytes() == np.ascontiguousarray(whole[selection]).tobytes()


def test_a_slice_needs_no_chunk_but_its_own(saved: Any, tmp_path: Path) -> None:
    """Every other chunk is overwritten with garbage: whoever decodes one of them fails its checksum."""
    key = "state/large/float32"
    array: Any = ac.open_zarr(saved.root)[key]
    assert array.shards is not None
    rows = array.chunks[0]
    expected = np.asarray(array[:rows])
    copy = tmp_path / "step"
    (copy / key).mkdir(parents=True)
    (copy / key / "zarr.json").write_bytes((saved.path / key / "zarr.json").read_bytes())
    data = bytearray((saved.path / key / "c.0.0").read_bytes())
    slots = array.shards[0] // rows
    index = np.frombuffer(data[-4 - 16 * slots : -4], "<u8").reshape(slots, 2).tolist()
    for offset, size in index[1:]:
        data[offset : offset + size] = bytes(size)
    (copy / key / "c.0.0").write_bytes(data)
    damaged: Any = zarr.open_array(copy / key, mode="r")
    assert np.asarray(damaged[:rows]).tobytes() == expected.tobytes()
    with pytest.raises((ValueError, RuntimeError)):
        damaged[rows : rows + 1]


def test_importing_asyncckpt_interop_is_all_that_another_program_needs(saved: Any) -> None:
    """In a fresh interpreter, so that nothing else has registered the types."""
    program = (
        "import sys, zarr, asyncckpt.interop\n"
        f"array = zarr.open_array({str(saved.path / 'state/small/bfloat16')!r}, mode='r')\n"
        "assert array[...].dtype.name == 'bfloat16'\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=100)
