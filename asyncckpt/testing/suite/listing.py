"""`Store.entries`."""

from __future__ import annotations

from pathlib import Path

from asyncckpt.stores.contract import Entry, Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import MiB, raw_files


class ListingTests:
    """Part of `StoreSuite`."""

    def test_a_new_store_is_empty(self, store: Store) -> None:
        assert store.entries("") == []

    def test_entries_lists_one_level_sorted(self, store: Store) -> None:
        store.put("d/b", b"22")
        store.put("d/a", b"1")
        store.put("d/c/x", b"")
        assert store.entries("d") == [Entry("a", False, 1), Entry("b", False, 2), Entry("c", True)]
        assert store.entries("") == [Entry("d", True)]

    def test_entries_are_sorted_by_name_whatever_they_are(self, store: Store) -> None:
        for key in ("b/x", "a0", "a/x", "a.b", "a-b", "B", "_"):
            store.put(key, b"")
        assert [entry.name for entry in store.entries("")] == sorted(["b", "a0", "a", "a.b", "a-b", "B", "_"])

    def test_entries_are_of_this_prefix_only(self, store: Store) -> None:
        for key in ("step/x", "step-1/y", "steps/z"):
            store.put(key, b"")
        assert store.entries("step") == [Entry("x", False)]

    def test_sizes_are_in_bytes_and_directories_have_none(self, store: Store) -> None:
        store.put("large", bytes(2 * MiB + 5))
        with store.create("written", 0) as sink:
            sink.write(b"123")
        store.put("directory/file", b"12")
        assert [(entry.name, entry.bytes) for entry in store.entries("")] == [
            ("directory", 0),
            ("large", 2 * MiB + 5),
            ("written", 3),
        ]

    def test_what_somebody_else_wrote_is_listed(self, store: Store, raw: RawAccess) -> None:
        raw.write("a/key", b"theirs")
        assert store.entries("a") == [Entry("key", False, 6)]

    def test_the_listing_agrees_with_the_place(self, store: Store, raw: RawAccess) -> None:
        for key in ("x", "d/y", "d/z"):
            store.put(key, b"")
        for prefix in ("", "d", "nowhere"):
            assert [entry.name for entry in store.entries(prefix)] == sorted(raw.names(prefix))

    def test_entries_of_nothing_is_empty(self, store: Store) -> None:
        assert store.entries("nowhere/at/all") == []

    def test_special_files_are_listed_as_such(self, store: Store, raw: RawAccess, tmp_path: Path) -> None:
        files = raw_files(raw)
        (tmp_path / "secret").write_bytes(b"secret")
        (tmp_path / "elsewhere").mkdir()
        files.fifo("fifo")
        files.symlink("link", str(tmp_path / "secret"))
        files.symlink("way-out", str(tmp_path / "elsewhere"))
        files.symlink("dangling", str(tmp_path / "nothing"))
        assert store.entries("") == [
            Entry("dangling", False, is_special=True),
            Entry("fifo", False, is_special=True),
            Entry("link", False, is_special=True),
            Entry("way-out", False, is_special=True),
        ]
