"""Where new directories go on file systems that can be asked."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.stores import LocalStore
from asyncckpt.stores.placement import Placement, are_subdirectories_spread, spread_subdirectories


class Clock:
    """Says that the directories made one after the other took so many milliseconds."""

    def __init__(self, *took_ms: float) -> None:
        self._took_ms = iter(took_ms)
        self._now_s = 0.0
        self._is_running = False

    def __call__(self) -> float:
        if self._is_running:
            self._now_s += 1e-3 * next(self._took_ms)
        self._is_running = not self._is_running
        return self._now_s

    def num_left(self) -> int:
        return len(list(self._took_ms))


@pytest.fixture
def area(tmp_path: Path) -> Path:
    spread_subdirectories(str(tmp_path))
    if not are_subdirectories_spread(str(tmp_path)):
        pytest.skip("the file system of the temporary directory cannot be told to spread directories")
    return tmp_path


def somewhere_else(path: str) -> int:
    return os.stat(path).st_ino


class Regions:
    """Says that the directories made one after the other lie in these regions."""

    def __init__(self, *regions: int) -> None:
        self._regions = iter(regions)

    def __call__(self, path: str) -> int:
        return next(self._regions)


def make_all(
    area: Path,
    clock: Callable[[], float],
    names: str,
    inodes: dict[str, int] | None = None,
    region: Callable[[str], int] = somewhere_else,
) -> None:
    """Make the directories; each has to be there alone in the end, and empty."""
    placement = Placement(region, clock)
    for name in names:
        placement.make(str(area / name))
        if inodes is not None:
            inodes[name] = os.stat(area / name).st_ino
    assert sorted(os.listdir(area)) == sorted(names)
    assert not any(os.listdir(area / name) for name in names)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of the directories in the order in which they are made."""
    made: list[int] = []
    real = os.mkdir

    def mkdir(path: str, *arguments: int) -> None:
        real(path, *arguments)
        made.append(os.stat(path).st_ino)

    monkeypatch.setattr(os, "mkdir", mkdir)
    return made


def test_the_first_one_is_compared_with_three_others(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    clock = Clock(3, 2, 1, 4, 99)
    make_all(area, clock, "a", inodes)
    assert len(made) == 4
    assert inodes["a"] == made[2]
    assert clock.num_left() == 1


def test_one_that_was_made_quickly_stays(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    make_all(area, Clock(1, 2, 2, 2, 1.4, 0.8), "abc", inodes)
    assert made == [inodes["a"], *made[1:4], inodes["b"], inodes["c"]]


def test_a_slow_one_moves_to_the_first_quick_place(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    clock = Clock(1, 2, 2, 2, *(7, 5, 6, 1.2), 99)
    make_all(area, clock, "ab", inodes)
    assert inodes["b"] == made[-1]
    assert clock.num_left() == 1


def test_where_every_place_is_slow_it_takes_the_quickest_of_nine(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    clock = Clock(1, 2, 2, 2, *(9, 8, 7, 6, 5, 4, 3, 8, 9), 99)
    make_all(area, clock, "ab", inodes)
    assert inodes["b"] == made[4 + 6]
    assert clock.num_left() == 1


def test_one_that_lies_where_another_does_moves_away(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    make_all(area, Clock(*[1] * 9), "abc", inodes, Regions(5, 6, 6, 6, *(5, 5, 7), *(7, 8)))
    assert inodes["a"] == made[0]
    assert inodes["b"] == made[6]
    assert inodes["c"] == made[8]


def test_where_there_is_no_other_place_it_is_the_one_used_longest_ago(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    make_all(area, Clock(*[1] * 15), "abcd", inodes, Regions(1, 9, 9, 9, 2, 3, *(3, 2, 1, 2, 3, 3, 3, 3, 3)))
    assert inodes["d"] == made[6 + 2]


def test_what_was_made_long_ago_is_forgotten(area: Path, made: list[int]) -> None:
    inodes: dict[str, int] = {}
    make_all(area, Clock(*[1] * 21), "abcdefghijklmnopqr", inodes, Regions(0, 99, 99, 99, *range(1, 17), 0))
    assert inodes["r"] == made[20]


def test_one_that_cannot_be_moved_stays(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir

    def refuse(path: str, *arguments: int) -> None:
        if path.endswith("~2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refuse)
    make_all(area, Clock(3, 2, 1, 3, 2, 1), "ab")


def test_elsewhere_it_is_a_plain_mkdir(tmp_path: Path) -> None:
    clock = Clock(5, 1)
    make_all(tmp_path, clock, "a")
    assert clock.num_left() == 1


def test_what_is_there_is_not_made_again(area: Path) -> None:
    placement = Placement()
    placement.make(str(area / "a"))
    (area / "a" / "file").touch()
    with pytest.raises(FileExistsError):
        placement.make(str(area / "a"))
    with pytest.raises(FileNotFoundError):
        placement.make(str(area / "b" / "c"))
    assert os.listdir(area) == ["a"]


def test_a_store_places_its_areas(area: Path, monkeypatch: pytest.MonkeyPatch, made: list[int]) -> None:
    monkeypatch.setattr("asyncckpt.stores.local.Placement", lambda: Placement(somewhere_else, Clock(4, 3, 2, 1)))
    LocalStore(area).open_barrier("a").close()
    assert os.listdir(area) == ["a"]
    assert os.stat(area / "a").st_ino == made[3]
