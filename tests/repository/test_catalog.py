from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from asyncckpt.repository import Catalog, CommittedStep, clean_partials
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]


def damage(store: LocalStore, key: str) -> None:
    path = Path(store.root) / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_steps_are_those_with_a_header_in_ascending_order(store: LocalStore, commit_step: CommitStep) -> None:
    for step in (30, 5, 100):
        commit_step(step)
    store.put("step-00000007/state/zarr.json", b"{}")
    store.put("step-00000008", b"a file")
    os.symlink(f"{store.root}/step-00000030", f"{store.root}/step-00000031")
    assert Catalog(store).steps() == [5, 30, 100]


def test_committed_lists_newest_first_and_puts_damaged_ones_aside(store: LocalStore, commit_step: CommitStep) -> None:
    for step in (1, 2, 3, 4):
        commit_step(step)
    damage(store, "step-00000002/zarr.json")
    damage(store, "step-00000004/zarr.json")
    catalog = Catalog(store)
    assert [committed.step for committed in catalog.committed()] == [3, 1]
    assert [damaged.step for damaged in catalog.damaged] == [4, 2]
    assert all(isinstance(damaged.error, CorruptCheckpointError) for damaged in catalog.damaged)


def test_an_empty_root_has_nothing(store: LocalStore) -> None:
    catalog = Catalog(store)
    assert (catalog.steps(), catalog.committed(), catalog.damaged) == ([], [], ())
    with pytest.raises(CheckpointNotFoundError, match="no committed step at"):
        catalog.find("latest")


def test_latest_skips_damaged_steps_and_says_so(store: LocalStore, commit_step: CommitStep) -> None:
    for step in (1, 2, 3):
        commit_step(step)
    damage(store, "step-00000003/zarr.json")
    catalog = Catalog(store)
    assert catalog.find("latest").step == 2
    assert [damaged.step for damaged in catalog.damaged] == [3]
    damage(store, "step-00000002/zarr.json")
    damage(store, "step-00000001/zarr.json")
    with pytest.raises(CheckpointNotFoundError, match="steps 3, 2, 1 are damaged"):
        catalog.find("latest")


def test_find_by_number(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(500)
    assert Catalog(store).find(500).info.step == 500
    with pytest.raises(CheckpointNotFoundError, match="no committed step 501"):
        Catalog(store).find(501)
    damage(store, "step-00000500/zarr.json")
    with pytest.raises(CorruptCheckpointError) as error:
        Catalog(store).find(500)
    assert error.value.fields["step"] == 500
    assert error.value.fields["damaged"][0]["key"] == "zarr.json"


def test_find_by_tag_takes_the_newest(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(1, tags=["good", "first"])
    commit_step(2, tags=["good"])
    commit_step(3)
    catalog = Catalog(store)
    assert catalog.find("good").step == 2
    assert catalog.find("first").step == 1
    with pytest.raises(CheckpointNotFoundError, match="tagged 'bad'"):
        catalog.find("bad")


def test_info_comes_from_the_header(store: LocalStore, commit_step: CommitStep) -> None:
    info = commit_step(500, tags=["good"]).info
    assert (info.step, info.nonce, info.tags) == (500, "nonce-500", ("good",))
    assert info.path == f"{store.root}/step-00000500"


def test_the_header_of_another_step_is_damage(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(500)
    shutil.copytree(f"{store.root}/step-00000500", f"{store.root}/step-00000600")
    with pytest.raises(CorruptCheckpointError, match="header of step 500"):
        Catalog(store).find(600)


def test_read_index_lists_every_file(store: LocalStore, commit_step: CommitStep) -> None:
    records = commit_step(500).read_index()
    assert {record.key: record.bytes for record in records}["state/w/c.0"] == len(b"chunk of w")
    assert len(records) == 6


@pytest.mark.parametrize("file", ["zarr.json", "c.0"])
@pytest.mark.parametrize("harm", ["change", "remove", "replace by a directory", "replace by a link"])
def test_a_damaged_index_is_corrupt(store: LocalStore, commit_step: CommitStep, file: str, harm: str) -> None:
    committed = commit_step(500)
    key = f"{committed.header.indexes[0].key}/{file}"
    path = Path(store.root) / "step-00000500" / key
    if harm == "change":
        damage(store, f"step-00000500/{key}")
    else:
        path.rename(Path(store.root) / "moved")
        if harm == "replace by a directory":
            path.mkdir()
        elif harm == "replace by a link":
            path.symlink_to(Path(store.root) / "moved")
    with pytest.raises(CorruptCheckpointError, match="step 500 is damaged: index/rank-00000"):
        committed.read_index()


def test_reading_a_deleted_step_is_not_found_rather_than_damage(store: LocalStore, commit_step: CommitStep) -> None:
    reader = commit_step(500)
    _ = reader.header
    CommittedStep(store, 500).delete()
    with pytest.raises(CheckpointNotFoundError):
        reader.read_index()
    with pytest.raises(CheckpointNotFoundError):
        reader.require_unchanged()


def test_a_step_written_again_is_not_the_one_that_was_read(store: LocalStore, commit_step: CommitStep) -> None:
    reader = commit_step(500)
    reader.require_unchanged()
    CommittedStep(store, 500).delete()
    commit_step(500, nonce="another")
    with pytest.raises(CheckpointNotFoundError):
        reader.require_unchanged()


def test_unreadable_is_damage_but_forbidden_is_not(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_step(1)
    commit_step(2)
    real = store.read

    def read(code: int) -> Callable[..., bytes]:
        def fail(key: str, *rest: int) -> bytes:
            if key == "step-00000002/zarr.json":
                raise StorageError("cannot read", errno=code)
            return real(key, *rest)

        return fail

    monkeypatch.setattr(store, "read", read(errno.EIO))
    assert Catalog(store).find("latest").step == 1
    monkeypatch.setattr(store, "read", read(errno.EACCES))
    with pytest.raises(StorageError):
        Catalog(store).find("latest")


def test_a_step_deleted_while_listing_is_skipped(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_step(1)
    monkeypatch.setattr(Catalog, "steps", lambda self: [1, 2])
    catalog = Catalog(store)
    assert [committed.step for committed in catalog.committed()] == [1]
    assert catalog.damaged == ()


def test_delete_removes_the_header_first_and_durably(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = commit_step(500)
    calls: list[tuple[str, str]] = []
    for name in ("delete", "sync_directory"):
        real = getattr(store, name)
        monkeypatch.setattr(store, name, lambda key, name=name, real=real: (calls.append((name, key)), real(key)))
    committed.delete()
    assert calls == [
        ("delete", "step-00000500/zarr.json"),
        ("sync_directory", "step-00000500"),
        ("delete", "step-00000500"),
    ]
    assert os.listdir(store.root) == [".asyncckpt"]
    with pytest.raises(CheckpointNotFoundError):
        committed.delete()


def test_a_half_deleted_step_is_never_offered_and_is_collected(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = commit_step(500)

    def fail(key: str) -> None:
        raise StorageError("power cut", errno=errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(store, "sync_directory", fail)
        with pytest.raises(StorageError):
            committed.delete()
    assert Catalog(store).steps() == []
    assert clean_partials(store) == ["step-00000500"]


def test_a_damaged_step_can_be_deleted(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(500)
    damage(store, "step-00000500/zarr.json")
    CommittedStep(store, 500).delete()
    assert Catalog(store).steps() == []


def test_repr_names_the_place(store: LocalStore) -> None:
    assert repr(CommittedStep(store, 500)) == f"CommittedStep('{store.root}/step-00000500')"
    assert repr(Catalog(store)) == f"Catalog('{store.url}')"
