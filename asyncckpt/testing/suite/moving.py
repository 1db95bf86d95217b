"""`Store.rename` and `Store.link`, where the store has them."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

from asyncckpt.stores.contract import Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import difference, pattern, raw_files, refused, require


class MovingTests:
    """Part of `StoreSuite`."""

    def test_rename_moves_a_directory(self, store: Store, raw: RawAccess) -> None:
        require(store, "rename")
        store.put("from/x/y", b"1")
        store.put("from/z", b"2")
        store.rename("from", "to")
        assert raw.read("to/x/y") == b"1"
        assert raw.read("to/z") == b"2"
        assert store.entries("from") == []
        assert raw.names("") == ["to"]

    def test_rename_moves_between_directories(self, store: Store, raw: RawAccess) -> None:
        require(store, "rename")
        store.put("area/part/x", b"1")
        store.rename("area/part", "whole")
        assert raw.read("whole/x") == b"1"
        assert store.entries("area") == []

    def test_rename_never_replaces(self, store: Store, raw: RawAccess) -> None:
        require(store, "rename")
        store.put("from/x", b"new")
        store.put("to/x", b"old")
        with refused(errno.EEXIST, errno.ENOTEMPTY, key=("from", "to")):
            store.rename("from", "to")
        assert (raw.read("to/x"), raw.read("from/x")) == (b"old", b"new")

    def test_rename_never_merges(self, store: Store, raw: RawAccess) -> None:
        require(store, "rename")
        store.put("from/x", b"new")
        store.put("to/below/y", b"old")
        with refused(errno.EEXIST, errno.ENOTEMPTY, key=("from", "to")):
            store.rename("from", "to")
        assert (raw.names("from"), raw.names("to")) == (["x"], ["below"])

    def test_rename_of_nothing_is_enoent(self, store: Store) -> None:
        require(store, "rename")
        with refused(errno.ENOENT, key=("from", "to")):
            store.rename("from", "to")

    def test_a_renamed_directory_appears_whole(self, store: Store) -> None:
        require(store, "rename")
        names = [f"file-{number}" for number in range(8)]
        for step in range(20):
            for name in names:
                store.put(f"from-{step}/{name}", b"1")

        def move() -> None:
            for step in range(20):
                store.rename(f"from-{step}", f"to-{step}")

        with ThreadPoolExecutor(1) as pool:
            moving = pool.submit(move)
            for step in range(20):
                found: list[str] = []
                while not found:
                    was_moved = moving.done()
                    found = [entry.name for entry in store.entries(f"to-{step}")]
                    assert found == names or (found == [] and not was_moved)
            moving.result()

    def test_link_shares_the_file(self, store: Store, raw: RawAccess) -> None:
        require(store, "hard_links")
        files = raw_files(raw)
        store.put("one/x", b"1")
        store.link("one/x", "two/deep/x")
        assert files.is_same_file("one/x", "two/deep/x")

    def test_link_survives_the_first_name(self, store: Store, raw: RawAccess) -> None:
        require(store, "hard_links")
        store.put("one/x", pattern(5000))
        store.link("one/x", "two/deep/x")
        assert difference(raw.read("two/deep/x"), pattern(5000)) is None
        store.delete("one")
        assert difference(raw.read("two/deep/x"), pattern(5000)) is None
        assert difference(store.read("two/deep/x"), pattern(5000)) is None

    def test_link_leaves_the_first_name(self, store: Store, raw: RawAccess) -> None:
        require(store, "hard_links")
        store.put("one", b"1")
        store.link("one", "two")
        store.delete("two")
        assert raw.read("one") == b"1"

    def test_link_never_replaces(self, store: Store, raw: RawAccess) -> None:
        require(store, "hard_links")
        store.put("one", b"1")
        store.put("two", b"2")
        with refused(errno.EEXIST, key=("one", "two")):
            store.link("one", "two")
        assert (raw.read("one"), raw.read("two")) == (b"1", b"2")

    def test_link_to_nothing_is_enoent(self, store: Store) -> None:
        require(store, "hard_links")
        with refused(errno.ENOENT, key=("one", "two/x")):
            store.link("one", "two/x")
