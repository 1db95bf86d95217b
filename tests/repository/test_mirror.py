"""Mirrors: what is copied, copies that are interrupted at every call, mirrors that are no mirrors."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from asyncckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ForeignRootError,
    InvalidOptionError,
    RootLockedError,
    StorageError,
)
from asyncckpt.policies import Best, Keep
from asyncckpt.repository import Catalog, CommittedStep, RunLock, clean_partials, prepare_root, verify_step
from asyncckpt.repository.copying import CopyStats, copy_step
from asyncckpt.repository.mirror import open_mirror, plan_mirror, require_apart
from asyncckpt.repository.names import HEADER
from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import Fault, FaultPoint, FaultStore, every_crash_point, every_error_point
from tests.repository.test_crash_points import FILES as SMALL
from tests.unit.test_retention import NOW, info

CommitStep = Callable[..., CommittedStep]


def go_on() -> None:
    """The pace of a copy that nobody holds up."""


def files_below(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


@pytest.fixture
def mirror(tmp_path: Path) -> LocalStore:
    return prepare_root(tmp_path / "mirror")


# What to copy


@pytest.mark.parametrize(
    ("source", "mirrored", "keep", "expected"),
    [
        ([1, 2, 3], [], Keep(last=3), [3, 2, 1]),
        ([1, 2, 3], [], Keep(last=1), [3]),
        ([1, 2, 3], [3], Keep(last=3), [2, 1]),
        ([1, 2, 3], [1, 2, 3], Keep(last=3), []),
        ([1, 2], [8, 9], Keep(last=2), [2, 1]),  # saved after going back, or by another run
        ([10, 15, 20, 25], [], Keep(last=1, every_steps=10), [25, 20, 10]),
        ([], [1, 2], Keep(last=1), []),
    ],
)
def test_the_newest_goes_first_and_nothing_that_would_be_removed_at_once(
    source: list[int], mirrored: list[int], keep: Keep, expected: list[int]
) -> None:
    saved_later = [info(step, at_s=86_400 * step) for step in source]
    plan = plan_mirror(saved_later, [info(step) for step in mirrored], keep, NOW)
    assert [found.step for found in plan] == expected


def test_the_best_and_the_tagged_are_copied_after_the_newest() -> None:
    source = [info(1, loss=1.0), info(2, loss=3.0), info(3, tags=("x",)), info(4), info(5)]
    plan = plan_mirror(source, [], Keep(last=1, best=Best("loss")), NOW)
    assert [found.step for found in plan] == [5, 3, 1]


def test_another_checkpoint_of_the_same_number_is_missing() -> None:
    plan = plan_mirror([replace(info(1), nonce="new"), info(2)], [info(1), info(2)], Keep(), NOW)
    assert [found.nonce for found in plan] == ["new"]


# Copying


@pytest.fixture
def source(commit_step: CommitStep) -> CommittedStep:
    return commit_step(500, tags=["good"])


def test_a_copy_is_the_same_step_byte_for_byte(source: CommittedStep, mirror: LocalStore) -> None:
    stats = copy_step(source, mirror, go_on)
    copy = Catalog(mirror).find("good")
    assert copy.header.nonce == source.header.nonce
    assert verify_step(copy).ok
    original = files_below(Path(source.location))
    assert files_below(Path(copy.location)) == original
    assert stats == CopyStats(sum(map(len, original.values())) - len(original["zarr.json"]), 0)
    assert mirror.entries(".asyncckpt/partial") == []
    assert copy_step(CommittedStep(source.store, 500), mirror, go_on) == CopyStats(), "it is there already"


def test_what_did_not_change_is_linked_on_the_mirror(
    source: CommittedStep, mirror: LocalStore, commit_step: CommitStep
) -> None:
    copy_step(source, mirror, go_on)
    big = source.read_file("state/big/c.0.0", 2**30)
    changed = commit_step(501, files={**SMALL, "state/w/c.0": b"another w", "state/big/c.0.0": big})
    stats = copy_step(changed, mirror, go_on, link_to=CommittedStep(mirror, 500))
    assert stats.linked_bytes == 5 * 2**20
    assert os.path.samefile(
        mirror.location("step-00000500/state/big/c.0.0"), mirror.location("step-00000501/state/big/c.0.0")
    )
    assert not os.path.samefile(
        mirror.location("step-00000500/state/w/c.0"), mirror.location("step-00000501/state/w/c.0")
    )
    assert verify_step(CommittedStep(mirror, 501)).ok


def test_a_file_cut_short_on_the_mirror_is_not_linked(
    source: CommittedStep, mirror: LocalStore, commit_step: CommitStep
) -> None:
    copy_step(source, mirror, go_on)
    os.truncate(mirror.location("step-00000500/state/big/c.0.0"), 100)
    copy_step(commit_step(501), mirror, go_on, link_to=CommittedStep(mirror, 500))
    assert verify_step(CommittedStep(mirror, 501)).ok


@pytest.mark.parametrize(
    "key", ["state/w/c.0", "state/big/c.0.0", "state/w/zarr.json", "index/rank-00000/c.0", "zarr.json"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut short", "missing"])
def test_a_damaged_step_is_not_mirrored_and_older_copies_stay(
    source: CommittedStep, mirror: LocalStore, commit_step: CommitStep, key: str, damage: str
) -> None:
    copy_step(source, mirror, go_on)
    path = Path(commit_step(501).location, key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    expected = CheckpointNotFoundError if (key, damage) == (HEADER, "missing") else CorruptCheckpointError
    with pytest.raises(expected):
        copy_step(CommittedStep(source.store, 501), mirror, go_on)
    assert Catalog(mirror).steps() == [500]
    assert verify_step(CommittedStep(mirror, 500)).ok
    assert mirror.entries(".asyncckpt/partial") == []


def test_a_step_deleted_under_the_copy_is_absent_not_damaged(source: CommittedStep, mirror: LocalStore) -> None:
    countdown = itertools.count(3, -1)

    def delete() -> None:
        if next(countdown) == 0:
            CommittedStep(source.store, 500).delete()

    with pytest.raises(CheckpointNotFoundError):
        copy_step(source, mirror, delete)
    assert Catalog(mirror).steps() == []


def test_a_copy_that_is_given_up_leaves_nothing(source: CommittedStep, mirror: LocalStore) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_step(source, mirror, stop)
    assert Catalog(mirror).steps() == []
    assert mirror.entries(".asyncckpt/partial") == []


def test_another_checkpoint_of_the_same_number_is_set_aside(
    source: CommittedStep, mirror: LocalStore, commit_step: CommitStep
) -> None:
    copy_step(source, mirror, go_on)
    old = files_below(Path(mirror.location("step-00000500")))
    CommittedStep(source.store, 500).delete()
    again = commit_step(500, nonce="again", files=SMALL)
    copy_step(again, mirror, go_on)
    assert CommittedStep(mirror, 500).header.nonce == "again"
    assert verify_step(CommittedStep(mirror, 500)).ok
    (aside,) = mirror.entries(".asyncckpt/damaged")
    assert files_below(Path(mirror.location(f".asyncckpt/damaged/{aside.name}"))) == old


# Interrupted at every call

EVERY = {
    "killed": every_crash_point,
    "error": every_error_point,
    "disk full": lambda *arguments: every_error_point(*arguments, error=errno.ENOSPC, persistent=True),
    "disk gone": lambda *arguments: every_error_point(*arguments, persistent=True),
}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("already", ["nothing", "an older step", "another checkpoint of this number"])
def test_a_mirror_never_offers_a_torn_step(
    commit_step: CommitStep, mirror: LocalStore, tmp_path: Path, kind: str, already: str
) -> None:
    if already == "an older step":
        copy_step(commit_step(1, files=SMALL), mirror, go_on)
    elif already != "nothing":
        copy_step(commit_step(2, files=SMALL, nonce="old"), mirror, go_on)
        CommittedStep(commit_step(3, files=SMALL).store, 2).delete()
    source = commit_step(2, files={**SMALL, "state/v/c.0": b"new"})
    before = files_below(Path(source.location))
    link_to = 1 if already == "an older step" else None
    numbers = itertools.count()

    def make() -> LocalStore:
        return LocalStore(shutil.copytree(mirror.root, tmp_path / f"copy-{next(numbers)}"))

    def copy(store: Store) -> None:
        link = None if link_to is None else CommittedStep(store, link_to)
        copy_step(CommittedStep(source.store, 2), store, go_on, link_to=link)

    def check(store: LocalStore, point: FaultPoint) -> None:
        assert files_below(Path(source.location)) == before
        catalog = Catalog(store)
        offered = {committed.step: committed.header.nonce for committed in catalog.committed()}
        assert catalog.damaged == ()
        assert all(verify_step(CommittedStep(store, step)).ok for step in offered)
        if link_to is not None:
            assert 1 in offered
        if point.raised is None:
            assert offered[2] == "nonce-2"
        # The next writer finds it missing, or there, and ends with the copy in either case.
        clean_partials(store)
        copy(store)
        assert CommittedStep(store, 2).header.nonce == "nonce-2"
        assert verify_step(CommittedStep(store, 2)).ok
        assert store.entries(".asyncckpt/partial") == []

    EVERY[kind](make, copy, check)


def test_a_replacement_that_cannot_be_committed_gives_the_number_back(
    source: CommittedStep, mirror: LocalStore, commit_step: CommitStep
) -> None:
    copy_step(source, mirror, go_on)
    CommittedStep(source.store, 500).delete()
    again = commit_step(500, nonce="again", files=SMALL)
    full = FaultStore(mirror, [Fault(call="wait", error=errno.ENOSPC)])
    with pytest.raises(StorageError):
        copy_step(again, full, go_on)
    assert CommittedStep(mirror, 500).header.nonce == "nonce-500"
    assert verify_step(CommittedStep(mirror, 500)).ok


# Opening


@pytest.mark.parametrize("mirror", ["root", "root/below", ".", "link", "link/below"])
def test_a_mirror_apart_from_its_root(tmp_path: Path, mirror: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    with pytest.raises(InvalidOptionError, match="elsewhere"):
        require_apart(str(tmp_path / "root"), str(tmp_path / mirror))
    require_apart(str(tmp_path / "root"), str(tmp_path / "other"))


def test_the_directory_of_a_mirror_is_created_once(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not there") as raised:
        open_mirror(store, tmp_path / "unmounted" / "mirror")
    assert raised.value.errno == errno.ENOENT
    assert not (tmp_path / "unmounted").exists()
    opened = open_mirror(store, tmp_path / "mirror")
    assert opened.is_on_same_disk
    with pytest.raises(RootLockedError):
        open_mirror(store, tmp_path / "mirror")
    opened.close()
    open_mirror(store, tmp_path / "mirror", may_create=False).close()
    shutil.rmtree(tmp_path / "mirror")
    with pytest.raises(StorageError, match="not there"):
        open_mirror(store, tmp_path / "mirror", may_create=False)
    assert not (tmp_path / "mirror").exists()


def test_a_mount_point_without_a_mount_is_left_alone(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not mounted") as raised:
        open_mirror(store, tmp_path / "mirror", mount=tmp_path)
    assert raised.value.errno == errno.ENODEV
    assert not (tmp_path / "mirror").exists()
    open_mirror(store, tmp_path / "mirror", mount="/").close()


def test_a_foreign_directory_is_not_touched(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "thesis.tex").write_text("done")
    with pytest.raises(ForeignRootError):
        open_mirror(store, tmp_path / "mirror")
    assert os.listdir(tmp_path / "mirror") == ["thesis.tex"]


def test_opening_clears_what_an_interrupted_copy_left(store: LocalStore, mirror: LocalStore) -> None:
    mirror.put(".asyncckpt/partial/step-00000001-x/state/w/c.0", b"half")
    mirror.put("step-00000002/state/w/c.0", b"half deleted")
    open_mirror(store, mirror.root).close()
    assert {entry.name for entry in mirror.entries("")} == {".asyncckpt"}
    assert mirror.entries(".asyncckpt/partial") == []
    RunLock.acquire(mirror).release()
