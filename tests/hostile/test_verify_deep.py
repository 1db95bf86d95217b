"""What only decoding finds, and what a sample leaves out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forge import Forge, with_crc

import asyncckpt as ac


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.fixture
def forge(root: Path) -> Forge:
    return Forge(root / "step-00000005")


def test_an_intact_step_is_sound(root: Path) -> None:
    report = ac.open(root).verify(5, deep=True)
    assert (report.ok, report.deep, report.sample) == (True, True, 1.0)
    assert report.checked_bytes == ac.open(root).verify(5).checked_bytes


def test_a_chunk_that_was_written_wrong_has_a_valid_digest_and_is_found(root: Path, forge: Forge) -> None:
    data = bytearray(forge.read("state/half/c.0"))
    data[20] ^= 1
    forge.put("state/half/c.0", bytes(data))
    forge.seal()
    assert ac.open(root).verify(5).ok
    (damage,) = ac.open(root).verify(5, deep=True).damaged
    assert (damage.key, damage.array, damage.tensors) == ("state/half/c.0", "state/half", ("half",))
    assert "crc32c" in damage.reason


def test_values_that_are_not_those_that_were_staged_are_found(root: Path, forge: Forge) -> None:
    other = forge.read("state/optimizer/exp_avg/weight/c.0.0")
    forge.put("state/optimizer/exp_avg_sq/weight/c.0.0", other, raw=b"something else")
    forge.seal()
    assert ac.open(root).verify(5).ok
    (damage,) = ac.open(root).verify(5, deep=True).damaged
    assert damage.reason == "it does not decode to what was saved"
    assert damage.tensors == ("optimizer/slots/exp_avg_sq/weight",)


def test_files_that_belong_to_no_array_are_found(root: Path, forge: Forge) -> None:
    forge.put("state/half/c.1", with_crc(b""))
    forge.put("state/lonely/c.0", with_crc(b""))
    forge.seal()
    assert {damage.key for damage in ac.open(root).verify(5, deep=True).damaged} == {
        "state/half/c.1",
        "state/lonely/c.0",
    }


@pytest.mark.parametrize("changes", [{"raw_bytes": 2**40}, {"arrays": 7}])
def test_counts_that_lie_are_found(root: Path, forge: Forge, changes: dict[str, int]) -> None:
    forge.header |= changes
    forge.seal()
    assert ac.open(root).verify(5).ok
    (damage,) = ac.open(root).verify(5, deep=True).damaged
    assert damage.key == "zarr.json"
    assert "it announces" in damage.reason


@pytest.mark.parametrize("deep", [False, True])
def test_a_sample_reads_some_files_and_says_so(root: Path, deep: bool) -> None:
    catalogue = ac.open(root)
    whole = catalogue.verify(5, deep=deep).checked_bytes
    report = catalogue.verify(5, deep=deep, sample=0.1, seed=7)
    assert (report.ok, report.sample, report.seed) == (True, 0.1, 7)
    assert 0.1 * whole <= report.checked_bytes < whole
    assert report == catalogue.verify(5, deep=deep, sample=0.1, seed=7)
    assert len({catalogue.verify(5, sample=0.1, seed=seed).checked_bytes for seed in range(8)}) > 1


def test_a_sample_still_looks_for_every_file(root: Path) -> None:
    (root / "step-00000005/state/half/c.0").unlink()
    (damage,) = ac.open(root).verify(5, sample=0.001).damaged
    assert (damage.key, damage.tensors) == ("state/half/c.0", ("half",))


@pytest.mark.parametrize("sample", [0, -1, 1.5, float("nan")])
def test_a_sample_is_a_fraction(root: Path, sample: float) -> None:
    with pytest.raises(ac.InvalidOptionError):
        ac.open(root).verify(5, sample=sample)


def test_every_tensor_over_a_damaged_file_is_named(root: Path) -> None:
    (root / "step-00000005/state/big/c.0.0").write_bytes(b"")
    (damage,) = ac.open(root).verify(5).damaged
    assert (damage.array, damage.tensors) == ("state/big", ("big", "corner"))
