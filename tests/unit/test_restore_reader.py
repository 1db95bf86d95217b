"""Reading tensors: everything verified, every damaged file named, or nothing returned."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.repository.catalog import Catalog, CommittedStep
from asyncckpt.restore.reader import read_tensors
from asyncckpt.restore.scratch import Scratch
from asyncckpt.stores import open_store

STATE = {
    "big": torch.arange(3_000_000, dtype=torch.float32).reshape(3000, 1000),
    "small": torch.arange(1000),
    "half": torch.randn(700, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3, dtype=torch.int16),
}
KEYS = [f"state/{name}" for name in STATE]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    ac.save_sync(root, 1, STATE)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "root"))


def open_step(root: Path) -> CommittedStep:
    return Catalog(open_store(root)).find(1)


def test_every_tensor_comes_back_bit_for_bit(root: Path) -> None:
    found = read_tensors(open_step(root), KEYS)
    for name, tensor in STATE.items():
        assert found[f"state/{name}"].dtype == tensor.dtype
        assert torch.equal(found[f"state/{name}"], tensor)


@pytest.mark.parametrize("threads", [1, 3])
def test_scratch_is_used_and_reused(root: Path, threads: int) -> None:
    arena = memoryview(bytearray(64 * 2**20))
    scratch = Scratch(lambda num_bytes: arena[:num_bytes])
    first = read_tensors(open_step(root), KEYS, threads=threads, memory=scratch)
    second = read_tensors(open_step(root), KEYS, threads=threads, memory=scratch)
    assert first["state/big"].data_ptr() == second["state/big"].data_ptr()
    assert first["state/big"].data_ptr() >= torch.frombuffer(arena, dtype=torch.uint8).data_ptr()


def test_only_what_is_asked_for_is_read(root: Path) -> None:
    shutil.rmtree(root / "step-00000001" / "state" / "big")
    assert read_tensors(open_step(root), ["state/small"]).keys() == {"state/small"}


def test_an_unknown_key_is_named(root: Path) -> None:
    with pytest.raises(ac.CorruptCheckpointError, match="state/unknown"):
        read_tensors(open_step(root), ["state/unknown"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def become_a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("damage", [flip, cut, grow, empty, Path.unlink, become_a_link])
@pytest.mark.parametrize("name", ["big/zarr.json", "big/c.0.0", "small/c.0"])
def test_damage_is_found_and_named(root: Path, damage: Callable[[Path], None], name: str) -> None:
    damage(root / "step-00000001" / "state" / name)
    with pytest.raises(ac.CorruptCheckpointError) as caught:
        read_tensors(open_step(root), KEYS)
    assert [entry["key"] for entry in caught.value.fields["damaged"]] == [f"state/{name}"]


def test_swapped_files_are_both_named(root: Path) -> None:
    state = root / "step-00000001" / "state"
    (state / "small" / "c.0").rename(state / "x")
    (state / "half" / "c.0").rename(state / "small" / "c.0")
    (state / "x").rename(state / "half" / "c.0")
    with pytest.raises(ac.CorruptCheckpointError) as caught:
        read_tensors(open_step(root), KEYS)
    assert [entry["key"] for entry in caught.value.fields["damaged"]] == ["state/half/c.0", "state/small/c.0"]


def test_a_step_deleted_while_it_is_read_is_absent_not_damaged(root: Path) -> None:
    committed = open_step(root)
    _ = committed.header
    shutil.rmtree(root / "step-00000001" / "state")
    (root / "step-00000001" / "zarr.json").unlink()
    with pytest.raises(ac.CheckpointNotFoundError):
        read_tensors(committed, KEYS)
