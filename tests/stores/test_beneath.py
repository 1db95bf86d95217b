"""No symbolic link below the root is followed, with openat2(2) and without it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from asyncckpt.errors import ForeignRootError, StorageError
from asyncckpt.repository import prepare_root
from asyncckpt.stores import LocalStore, beneath


@pytest.fixture(params=["openat2", "walking"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """A store whose root is reached through a link of the user's own; ``a/b/file`` is in it."""
    if request.param == "walking":
        monkeypatch.setattr(beneath, "_openat2", None)
    elif beneath._openat2 is None:
        pytest.skip("this platform has no openat2")
    (tmp_path / "real/root").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    store = LocalStore(tmp_path / "link/root")
    store.put("a/b/file", b"data")
    return store


def number_of_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_links_above_the_root_are_the_users_own(store: LocalStore) -> None:
    before = number_of_descriptors()
    assert store.read("a/b/file") == b"data"
    assert [entry.name for entry in store.entries("a/b")] == ["file"]
    assert [entry.name for entry in store.entries("")] == ["a"]
    assert number_of_descriptors() == before


@pytest.mark.parametrize("part", ["a", "a/b", "a/b/file"])
def test_no_part_of_a_key_may_be_a_link(store: LocalStore, tmp_path: Path, part: str) -> None:
    path = Path(store.location(part))
    outside = path.rename(tmp_path / "outside")
    path.symlink_to(outside)
    before = number_of_descriptors()
    with pytest.raises(StorageError) as caught:
        store.read("a/b/file")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(StorageError) as caught:
        store.read_into("a/b/file", memoryview(bytearray(4)))
    assert caught.value.errno == errno.ELOOP
    if part != "a/b/file":
        with pytest.raises(StorageError) as caught:
            store.entries("a/b")
        assert caught.value.errno == errno.ELOOP
        with pytest.raises(StorageError) as caught:
            store.delete("a/b/file")
        assert caught.value.errno == errno.ELOOP
    assert outside.exists()
    assert number_of_descriptors() == before


def test_a_link_itself_can_be_deleted(store: LocalStore, tmp_path: Path) -> None:
    outside = Path(store.location("a")).rename(tmp_path / "outside")
    Path(store.location("a")).symlink_to(outside)
    store.delete("a")
    assert store.entries("") == []
    assert (outside / "b/file").read_bytes() == b"data"


@pytest.mark.parametrize("key", ["a/b/none", "a/none/file", "a/b/file/none"])
def test_what_is_missing_is_missing(store: LocalStore, key: str) -> None:
    with pytest.raises(StorageError) as caught:
        store.read(key)
    assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR)
    assert caught.value.errno != errno.ELOOP


def test_a_root_that_was_replaced_is_noticed(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "real/root").rename(tmp_path / "real/old")
    (tmp_path / "real/root").mkdir()
    with pytest.raises(StorageError) as caught:
        store.read("a/b/file")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_where_the_call_is_forbidden_the_path_is_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def forbidden(*_: object) -> int:
        beneath.ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(beneath, "_openat2", forbidden)
    store = LocalStore(tmp_path)
    store.put("a/file", b"data")
    assert store.read("a/file") == b"data"


@pytest.mark.parametrize("own", [".asyncckpt", ".asyncckpt/partial"])
def test_a_root_whose_own_directories_are_links_is_not_written_to(tmp_path: Path, own: str) -> None:
    (tmp_path / "precious/partial").mkdir(parents=True)
    (tmp_path / "precious/partial/thesis").write_text("precious")
    prepare_root(tmp_path / "root")
    path = tmp_path / "root" / own
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "precious" / own.partition("/")[2])
    with pytest.raises(ForeignRootError, match="symbolic link"):
        prepare_root(tmp_path / "root")
    assert (tmp_path / "precious/partial/thesis").exists()
