"""Where new directories go on file systems that can be asked."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from asyncckpt.stores import LocalStore
from asyncckpt.stores.placement import Placement, are_subdirectories_spread, spread_subdirectories


class Regions:
    """Says that the directories it is asked about lie in these regions, in the order in which it sees them."""

    def __init__(self, regions: Iterable[int]) -> None:
        self._next = iter(regions)
        self._found: dict[int, int] = {}

    def __call__(self, path: str) -> int:
        inode = os.stat(path).st_ino
        if inode not in self._found:
            self._found[inode] = next(self._next)
        return self._found[inode]


@pytest.fixture
def area(tmp_path: Path) -> Path:
    spread_subdirectories(str(tmp_path))
    if not are_subdirectories_spread(str(tmp_path)):
        pytest.skip("the file system of the temporary directory cannot be told to spread directories")
    return tmp_path


def make_all(area: Path, regions: Regions, names: str) -> list[int]:
    placement = Placement(regions)
    for name in names:
        placement.make(str(area / name))
    assert sorted(os.listdir(area)) == sorted(names)
    return [regions(str(area / name)) for name in names]


def test_a_directory_moves_away_from_those_made_before(area: Path) -> None:
    assert make_all(area, Regions([5, 5, 5, 7, 5, 7, 8]), "abc") == [5, 7, 8]


def test_the_first_name_is_kept_where_nothing_was_made(area: Path) -> None:
    assert make_all(area, Regions([5, 6, 7]), "abc") == [5, 6, 7]


def test_where_there_is_no_other_place_it_is_the_one_used_longest_ago(area: Path) -> None:
    assert make_all(area, Regions([1, 2, 3, *(3, 2, 1, 2, 3, 3, 3, 3, 3)]), "abcd") == [1, 2, 3, 1]


def test_it_stays_where_no_other_name_is_better(area: Path) -> None:
    assert make_all(area, Regions([4] * 10), "ab") == [4, 4]


def test_what_was_made_long_ago_is_forgotten(area: Path) -> None:
    assert make_all(area, Regions([*range(17), 0]), "abcdefghijklmnopqr")[-1] == 0


def test_one_that_cannot_be_moved_stays(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir

    def refuse(path: str, *arguments: int) -> None:
        if path.endswith("~2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert make_all(area, Regions([4, 4, 4]), "ab") == [4, 4]


def test_elsewhere_it_is_a_plain_mkdir(tmp_path: Path) -> None:
    Placement(Regions([])).make(str(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_there_is_not_made_again(area: Path) -> None:
    placement = Placement(Regions([1]))
    placement.make(str(area / "a"))
    (area / "a" / "file").touch()
    with pytest.raises(FileExistsError):
        placement.make(str(area / "a"))
    with pytest.raises(FileNotFoundError):
        placement.make(str(area / "b" / "c"))
    assert os.listdir(area) == ["a"]


def test_a_store_has_no_two_areas_in_a_row_in_one_place(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = Regions([1, 1, 2, 2, 1, 3])
    monkeypatch.setattr("asyncckpt.stores.local.Placement", lambda: Placement(regions))
    store = LocalStore(area)
    for name in "abc":
        store.open_barrier(name).close()
    assert sorted(os.listdir(area)) == ["a", "b", "c"]
    assert [regions(str(area / name)) for name in "abc"] == [1, 2, 3]
