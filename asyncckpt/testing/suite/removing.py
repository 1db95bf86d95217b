"""`Store.delete`."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncckpt.errors import InvalidOptionError
from asyncckpt.stores.contract import Entry, Store
from asyncckpt.testing.raw import RawAccess
from asyncckpt.testing.suite.checks import raw_files


class RemovingTests:
    """Part of `StoreSuite`."""

    def test_delete_removes_files_and_trees_and_is_idempotent(self, store: Store, raw: RawAccess) -> None:
        store.put("tree/a/b", b"1")
        store.put("tree/c", b"2")
        store.put("file", b"3")
        for _ in range(2):
            store.delete("tree")
            store.delete("file")
        assert store.entries("") == []
        assert raw.names("") == []

    def test_delete_of_what_never_was_is_no_error(self, store: Store) -> None:
        store.put("a/file", b"1")
        for prefix in ("nothing", "no/such/thing", "a/other"):
            store.delete(prefix)
        assert store.entries("a") == [Entry("file", False, 1)]

    def test_delete_takes_nothing_whose_name_begins_alike(self, store: Store) -> None:
        for key in ("step/x", "step-1/y", "steps/z", "step.z"):
            store.put(key, b"1")
        store.delete("step")
        assert [entry.name for entry in store.entries("")] == ["step-1", "step.z", "steps"]

    def test_delete_of_one_file_leaves_its_neighbours(self, store: Store) -> None:
        store.put("tree/a", b"1")
        store.put("tree/ab", b"2")
        store.delete("tree/a")
        assert store.entries("tree") == [Entry("ab", False, 1)]

    def test_delete_removes_what_somebody_else_wrote(self, store: Store, raw: RawAccess) -> None:
        store.put("tree/ours", b"1")
        raw.write("tree/below/theirs", b"2")
        store.delete("tree")
        assert store.entries("") == []

    def test_delete_never_follows_links(self, store: Store, raw: RawAccess, tmp_path: Path) -> None:
        files = raw_files(raw)
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "precious").write_bytes(b"1")
        store.put("tree/file", b"1")
        files.symlink("tree/link", str(outside))
        files.symlink("link", str(outside))
        files.symlink("tree/file-link", str(outside / "precious"))
        store.delete("tree")
        store.delete("link")
        assert (outside / "precious").exists()
        assert store.entries("") == []

    def test_delete_removes_special_files(self, store: Store, raw: RawAccess) -> None:
        files = raw_files(raw)
        store.put("tree/file", b"1")
        files.fifo("tree/fifo")
        files.fifo("fifo")
        store.delete("tree")
        store.delete("fifo")
        assert store.entries("") == []

    def test_the_root_itself_cannot_be_deleted(self, store: Store) -> None:
        store.put("key", b"1")
        with pytest.raises(InvalidOptionError):
            store.delete("")
        assert store.read("key") == b"1"
