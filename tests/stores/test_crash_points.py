"""`every_crash_point` and `every_error_point`, on actions that are right and actions that are wrong."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.errors import StorageError
from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import Call, FaultPoint, RawDirectory, SimulatedCrash, every_crash_point, every_error_point

MakeStore = Callable[[], LocalStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    numbers = itertools.count()

    def make() -> LocalStore:
        root = tmp_path / f"root-{next(numbers)}"
        root.mkdir()
        return LocalStore(root)

    return make


def names(store: LocalStore, prefix: str = "") -> list[str]:
    return sorted(RawDirectory(store.root).names(prefix))


def publish(store: Store) -> None:
    """Right: what is in "public" is always complete."""
    with store.create("private/data") as sink:
        sink.write(b"data")
    store.rename("private", "public")


def test_every_call_is_met_at_every_moment(make_store: MakeStore) -> None:
    found: list[tuple[str, list[str]]] = []
    points = every_crash_point(make_store, publish, lambda store, point: found.append((str(point), names(store))))
    assert found == [
        ("before call 1, create('private/data')", []),
        ("after call 1, create('private/data')", ["private"]),
        ("before call 2, write('private/data')", ["private"]),
        ("halfway call 2, write('private/data')", ["private"]),
        ("after call 2, write('private/data')", ["private"]),
        ("before call 3, close('private/data')", ["private"]),
        ("after call 3, close('private/data')", ["private"]),
        ("before call 4, rename('private', 'public')", ["private"]),
        ("after call 4, rename('private', 'public')", ["public"]),
    ]
    assert [str(point) for point in points] == [point for point, _ in found]
    assert all(isinstance(point.raised, SimulatedCrash) for point in points)
    assert points[3] == FaultPoint(2, Call("write", "private/data"), "halfway", points[3].raised)


def test_a_wrong_action_is_found_out_and_the_place_is_named(make_store: MakeStore) -> None:
    def publish_in_place(store: Store) -> None:
        store.put("public/data", b"data")

    def check(store: LocalStore, point: FaultPoint) -> None:
        assert names(store) == [] or store.read("public/data") == b"data"

    with pytest.raises(AssertionError) as error:
        every_crash_point(make_store, publish_in_place, check)
    assert error.value.__notes__ == ["""interrupted halfway call 1 of ["put('public/data')"]"""]


def test_errors_let_the_action_go_on(make_store: MakeStore) -> None:
    def careful(store: Store) -> None:
        try:
            publish(store)
        except StorageError:
            store.delete("private")
            raise

    def check(store: LocalStore, point: FaultPoint) -> None:
        # An error after the rename is a lost answer.
        assert names(store) == (["public"] if (point.call.name, point.moment) == ("rename", "after") else [])
        assert isinstance(point.raised, StorageError)
        assert point.raised.errno == errno.ENOSPC

    assert len(every_error_point(make_store, careful, check, error=errno.ENOSPC)) == 9


def test_persistent_errors_hit_the_cleaning_up_too(make_store: MakeStore) -> None:
    def careful(store: Store) -> None:
        try:
            publish(store)
        except StorageError:
            store.delete("private")

    left: list[list[str]] = []
    every_error_point(make_store, careful, lambda store, _: left.append(names(store)), persistent=True)
    assert left.count(["private"]) > 0
    left.clear()
    points = every_error_point(make_store, careful, lambda store, _: left.append(names(store)))
    assert left == [[]] * 8 + [["public"]]
    assert [point.raised for point in points] == [None] * 9


def test_an_action_without_calls_proves_nothing(make_store: MakeStore) -> None:
    with pytest.raises(AssertionError, match="makes no call"):
        every_crash_point(make_store, lambda store: store.url, lambda *_: None)


def test_an_action_that_changes_is_noticed(make_store: MakeStore) -> None:
    runs = itertools.count()

    def shrinking(store: Store) -> None:
        for number in range(3 - next(runs)):
            store.put(str(number), b"")

    with pytest.raises(AssertionError, match="not the same each time"):
        every_crash_point(make_store, shrinking, lambda *_: None)


def test_what_the_action_raises_by_itself_is_no_crash(make_store: MakeStore) -> None:
    runs = itertools.count()

    def buggy(store: Store) -> None:
        if next(runs) == 2:
            raise ZeroDivisionError
        store.put("key", b"")

    with pytest.raises(ZeroDivisionError):
        every_crash_point(make_store, buggy, lambda *_: None)


def test_what_the_dead_process_had_open_is_given_back(make_store: MakeStore) -> None:
    def leave_open(store: Store) -> None:
        store.create("one", 2**21)
        store.open_barrier("two")

    before = len(os.listdir("/proc/self/fd"))
    every_crash_point(make_store, leave_open, lambda *_: None)
    assert len(os.listdir("/proc/self/fd")) == before
