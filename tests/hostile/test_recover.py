"""Salvaging a damaged step: what is intact comes back bit for bit, what is lost is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import victim
from forge import Forge

import asyncckpt as ac

INDEX = "index/rank-00000/c.0"


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def flip(root: Path, key: str) -> None:
    path = root / "step-00000005" / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lost_tensors(found: ac.Recovered) -> set[str]:
    return {tensor for damage in found.lost for tensor in damage.tensors}


def test_an_intact_step_is_recovered_whole(root: Path) -> None:
    found = ac.open(root).recover(5)
    assert found.lost == ()
    assert found.info == ac.open(root).latest
    assert victim.fingerprint(found.state) == victim.fingerprint(ac.load(root, 5))


@pytest.mark.parametrize("name", ["zarr.json", "c.0.0"])
def test_a_lost_array_is_left_out_with_every_tensor_over_it(root: Path, name: str) -> None:
    wanted = ac.load(root, 5)
    flip(root, f"state/big/{name}")
    with pytest.raises(ac.CorruptCheckpointError):
        ac.load(root, 5)
    found = ac.open(root).recover(5)
    assert [(damage.key, damage.array) for damage in found.lost] == [(f"state/big/{name}", "state/big")]
    assert lost_tensors(found) == {"big", "corner"}
    del wanted["big"], wanted["corner"]
    assert victim.fingerprint(found.state) == victim.fingerprint(wanted)


def test_losses_inside_containers_keep_places_and_names(root: Path) -> None:
    flip(root, "state/plain/tensors/0/c.0")
    flip(root, "state/quantized/values/c.0.0")
    flip(root, "state/optimizer/exp_avg/weight/c.0.0")
    found = ac.open(root).recover("latest")
    assert found.state["plain"]["tensors"] == [None]
    assert found.state["plain"]["list"] == [1, "two", (3.0, None)]
    assert "quantized" not in found.state
    assert set(found.state["optimizer"]["state"][0]) == {"step", "exp_avg_sq"}
    assert set(found.state["optimizer"]["state"][1]) == {"step", "exp_avg", "exp_avg_sq"}
    assert len(found.lost) == 3


def test_with_a_damaged_index_the_checksums_of_the_chunks_decide(root: Path) -> None:
    wanted = ac.load(root, 5)
    flip(root, INDEX)
    flip(root, "state/half/c.0")
    found = ac.open(root).recover(5)
    assert {damage.key for damage in found.lost} == {INDEX, "state/half/c.0"}
    del wanted["half"]
    assert victim.fingerprint(found.state) == victim.fingerprint(wanted)


def test_with_a_damaged_index_an_array_that_is_not_what_the_tree_says_is_lost(root: Path) -> None:
    step = root / "step-00000005"
    shutil.rmtree(step / "state/optimizer/exp_avg/weight")
    shutil.copytree(step / "state/quantized/values", step / "state/optimizer/exp_avg/weight")
    flip(root, INDEX)
    found = ac.open(root).recover(5)
    assert lost_tensors(found) == {"optimizer/slots/exp_avg/weight"}
    assert "exp_avg" not in found.state["optimizer"]["state"][0]


def test_without_a_checksum_in_its_codecs_only_the_index_vouches_for_an_array(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(500)}, compression=[{"name": "bytes"}]) as ckpt:
        ckpt.save(5).result(60)
    assert ac.open(tmp_path).recover(5).lost == ()
    flip(tmp_path, INDEX)
    found = ac.open(tmp_path).recover(5)
    assert found.state == {}
    assert lost_tensors(found) == {"w"}


@pytest.mark.parametrize("how", ["flipped", "missing", "malformed tree"])
def test_without_a_header_arrays_come_by_key(root: Path, how: str) -> None:
    step = root / "step-00000005"
    wanted = victim.make_state(1)
    if how == "flipped":
        flip(root, "zarr.json")
    elif how == "missing":
        (step / "zarr.json").unlink()
    else:
        forge = Forge(step)
        forge.header["tree"] = {"x": {"$": "nothing"}}
        forge.seal()
    flip(root, "state/half/c.0")
    found = ac.open(root).recover(5)
    assert (found.info is None) == (how != "malformed tree")
    assert {damage.key for damage in found.lost} == {"zarr.json", "state/half/c.0"}
    assert torch.equal(found.state["state/big"], wanted["big"])
    assert np.array_equal(found.state["state/array"].numpy(), wanted["array"])
    assert "state/half" not in found.state


def test_a_step_that_was_set_aside_is_recovered_from_its_path(root: Path) -> None:
    victim.save(root, 4, seed=4)
    flip(root, "state/half/c.0")
    with ac.Checkpointer(root, victim.make_state(9), writer=ac.Writer(kind="thread")) as ckpt:
        with pytest.warns(RuntimeWarning, match="set aside"):
            ckpt.restore()
        (aside,) = (root / ".asyncckpt/damaged").iterdir()
        found = ckpt.recover(aside)
    assert found.info is not None
    assert found.info.step == 5
    assert lost_tensors(found) == {"half"}
    assert torch.equal(found.state["big"], victim.make_state(1)["big"])


def test_what_cannot_be_recovered(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ac.CheckpointNotFoundError):
        ac.open(root).recover(6)
    with pytest.raises(ac.InvalidOptionError, match="not the directory of a step"):
        ac.open(root).recover(tmp_path)
    forge = Forge(root / "step-00000005")
    forge.header["format"] = 2
    forge.seal()
    with pytest.raises(ac.UnsupportedFormatError):
        ac.open(root).recover(5)
