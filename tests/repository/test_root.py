from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncckpt.errors import ForeignRootError, InvalidOptionError, StorageError
from asyncckpt.repository import clean_partials, prepare_root
from asyncckpt.stores import LocalStore


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of everything fsynced."""
    paths: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (paths.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    return paths


@pytest.mark.parametrize("exists", [False, True], ids=["new", "made by a launcher script"])
def test_every_directory_on_the_way_is_durable(tmp_path: Path, synced: list[str], exists: bool) -> None:
    root = tmp_path / "a" / "b" / "root"
    if exists:
        (root / ".asyncckpt" / "partial").mkdir(parents=True)
    assert prepare_root(root).root == str(root)
    above_partial = ["a/b/root/.asyncckpt", "a/b/root", "a/b", "a", "", ".."]
    assert synced[:6] == [os.path.normpath(tmp_path / name) for name in above_partial]


def test_the_directories_behind_a_link_are_durable(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "scratch" / "root").mkdir(parents=True)
    (tmp_path / "link").symlink_to("scratch/root")
    prepare_root(tmp_path / "link")
    assert str(tmp_path / "scratch") in synced


def test_a_parent_that_may_not_be_read_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, *arguments: int) -> int:
        if path == str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    assert os.listdir(prepare_root(tmp_path / "root").root) == [".asyncckpt"]


def test_preparing_again_changes_nothing(tmp_path: Path) -> None:
    prepare_root(tmp_path / "root")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    prepare_root((tmp_path / "root").as_uri())
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["step-00000500", "lost+found", ".asyncckpt"])
def test_an_empty_or_own_directory_is_accepted(tmp_path: Path, name: str) -> None:
    prepare_root(tmp_path)
    (tmp_path / ".asyncckpt" / "partial").rmdir()
    (tmp_path / ".asyncckpt").rmdir()
    (tmp_path / name).mkdir()
    prepare_root(tmp_path)


def test_users_files_beside_checkpoints_are_fine_once_the_root_is_ours(tmp_path: Path) -> None:
    prepare_root(tmp_path)
    (tmp_path / "train.log").write_text("step 1")
    prepare_root(tmp_path)
    assert (tmp_path / "train.log").read_text() == "step 1"


@pytest.mark.parametrize("name", ["src", "step-5", "step-latest", ".git"])
def test_a_foreign_directory_is_refused_and_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "step-00000500").mkdir()
    with pytest.raises(ForeignRootError, match=f"holds '{name}'") as error:
        prepare_root(tmp_path)
    assert error.value.fields["found"] == [name]
    assert sorted(os.listdir(tmp_path)) == sorted([name, "step-00000500"])


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("mine")
    with pytest.raises(ForeignRootError, match="not a directory"):
        prepare_root(tmp_path / "root")
    with pytest.raises(StorageError) as error:
        prepare_root(tmp_path / "root" / "below")
    assert error.value.errno == errno.ENOTDIR


def test_a_place_where_nothing_can_be_created_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="could not prepare the checkpoint root") as error:
        prepare_root("/proc/asyncckpt-root")
    assert error.value.errno in (errno.ENOENT, errno.EACCES, errno.EPERM)


def test_another_scheme_is_refused() -> None:
    with pytest.raises(InvalidOptionError):
        prepare_root("s3://bucket/run")


@pytest.fixture
def read_only_root(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    prepare_root(root)
    if not _succeeds("mount", "--bind", root, root):
        pytest.skip("mounting is not allowed here")
    try:
        if not _succeeds("mount", "-o", "remount,ro,bind", root):
            pytest.skip("remounting is not allowed here")
        yield root
    finally:
        subprocess.run(["umount", root], check=True)


def _succeeds(*command: str | Path) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_read_only_root_is_refused_at_once(read_only_root: Path) -> None:
    with pytest.raises(StorageError) as error:
        prepare_root(read_only_root)
    assert error.value.errno == errno.EROFS


def test_cleaning_removes_what_dead_writers_left_and_nothing_else(store: LocalStore) -> None:
    store.put(".asyncckpt/partial/step-00000007-abc/state/w/c.0", b"1")
    store.put(".asyncckpt/partial/stray", b"1")
    store.put("step-00000008/state/w/c.0", b"half deleted")
    store.put("step-00000009/zarr.json", b"not even readable, but present")
    store.put("notes/step-00000008/x", b"1")
    store.put("step-8/x", b"1")
    assert sorted(clean_partials(store)) == [
        ".asyncckpt/partial/step-00000007-abc",
        ".asyncckpt/partial/stray",
        "step-00000008",
    ]
    assert sorted(os.listdir(store.root)) == [".asyncckpt", "notes", "step-00000009", "step-8"]
    assert os.listdir(f"{store.root}/.asyncckpt/partial") == []
    assert clean_partials(store) == []
