from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.errors import CheckpointNotFoundError, StorageError
from asyncckpt.repository import CommittedStep, verify_step
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]
KEYS = [
    "index/zarr.json",
    "state/big/c.0.0",
    "state/big/zarr.json",
    "state/w/c.0",
    "state/w/zarr.json",
    "state/zarr.json",
]


@pytest.fixture
def committed(commit_step: CommitStep) -> CommittedStep:
    return commit_step(500)


def path(committed: CommittedStep, key: str) -> Path:
    return Path(committed.location) / key


def damaged(committed: CommittedStep) -> dict[str, str]:
    report = verify_step(CommittedStep(committed.store, committed.step))
    assert report.ok is not bool(report.damaged)
    return {damage.key: damage.reason for damage in report.damaged}


@pytest.mark.parametrize("threads", [1, 4])
def test_an_intact_step_is_ok(committed: CommittedStep, threads: int) -> None:
    report = verify_step(committed, threads)
    assert report.ok
    assert report.step == 500
    assert report.num_files == len(KEYS) + 3
    assert report.checked_bytes == sum(path(committed, key).stat().st_size for key in KEYS)
    assert not report.deep


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit_is_found(committed: CommittedStep, key: str, position: int) -> None:
    data = bytearray(path(committed, key).read_bytes())
    data[position] ^= 0x80
    path(committed, key).write_bytes(data)
    assert damaged(committed) == {key: "the contents differ from what was written"}


@pytest.mark.parametrize("key", KEYS)
def test_a_truncated_file_is_found(committed: CommittedStep, key: str) -> None:
    size = path(committed, key).stat().st_size
    os.truncate(path(committed, key), size - 1)
    assert damaged(committed) == {key: f"{size - 1} bytes instead of {size}"}


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_file_is_found(committed: CommittedStep, key: str) -> None:
    path(committed, key).unlink()
    assert damaged(committed) == {key: "the file is missing"}


def test_an_unexpected_file_is_found(committed: CommittedStep) -> None:
    path(committed, "state/w/c.1").write_bytes(b"")
    path(committed, "notes.txt").write_bytes(b"mine")
    assert damaged(committed) == {"state/w/c.1": "unexpected file", "notes.txt": "unexpected file"}


def test_links_and_pipes_are_neither_followed_nor_waited_for(committed: CommittedStep, tmp_path: Path) -> None:
    path(committed, "state/w/c.0").rename(tmp_path / "c.0")
    path(committed, "state/w/c.0").symlink_to(tmp_path / "c.0")
    path(committed, "state/w/zarr.json").unlink()
    os.mkfifo(path(committed, "state/w/zarr.json"))
    os.mkfifo(path(committed, "fifo"))
    path(committed, "state/big").rename(tmp_path / "big")
    path(committed, "state/big").symlink_to(tmp_path / "big")
    special = "neither a file nor a directory"
    assert damaged(committed) == {
        "state/w/c.0": special,
        "state/w/zarr.json": special,
        "fifo": special,
        "state/big": special,
        "state/big/c.0.0": "the file is missing",
        "state/big/zarr.json": "the file is missing",
    }


def test_a_damaged_header_is_reported(committed: CommittedStep) -> None:
    path(committed, "zarr.json").write_bytes(b"{}")
    assert list(damaged(committed)) == ["zarr.json"]


def test_a_damaged_index_is_reported_and_the_rest_is_not_called_unexpected(committed: CommittedStep) -> None:
    index = committed.header.indexes[0].key
    path(committed, f"{index}/c.0").write_bytes(b"{}")
    assert list(damaged(committed)) == [index]
    path(committed, f"{index}/c.0").unlink()
    assert damaged(committed) == {f"{index}/c.0": "the file is missing"}


def test_a_step_that_is_not_there(store: LocalStore) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify_step(CommittedStep(store, 1))


@pytest.mark.parametrize("written_again", [False, True])
def test_a_step_deleted_meanwhile_is_not_found_rather_than_damaged(
    committed: CommittedStep, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch, written_again: bool
) -> None:
    store = committed.store
    real = store.read_into

    def delete_then_read(key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        monkeypatch.undo()
        CommittedStep(store, 500).delete()
        if written_again:
            commit_step(500, files={"state/zarr.json": b"{}"}, nonce="another")
        return real(key, out, offset, cache=cache)

    monkeypatch.setattr(store, "read_into", delete_then_read)
    with pytest.raises(CheckpointNotFoundError):
        verify_step(committed, threads=1)


def test_a_file_that_cannot_be_read_is_damage(committed: CommittedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    store = committed.store
    real = store.read_into

    def fail(key: str, *rest: object, **options: bool) -> int:
        if key.endswith("state/w/c.0"):
            raise StorageError("medium error", errno=5)
        return real(key, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read_into", fail)
    report = verify_step(committed)
    assert [(damage.key, damage.reason) for damage in report.damaged] == [("state/w/c.0", "medium error")]
