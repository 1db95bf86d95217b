"""Removing and setting aside steps, interrupted at every call: other steps stay, a torn one is never offered."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from asyncckpt.policies import Keep
from asyncckpt.repository import (
    Catalog,
    CommittedStep,
    Decision,
    RetentionPlan,
    StepWriter,
    clean_partials,
    execute_retention,
    plan_retention,
    verify_step,
)
from asyncckpt.repository.quarantine import quarantine_step
from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import FaultPoint, SimulatedCrash, every_crash_point, every_error_point

CommitStep = Callable[..., CommittedStep]
MakeStore = Callable[[], LocalStore]
FILES = {"state/zarr.json": b"{}", "state/w/zarr.json": b"{w}", "state/w/c.0": b"chunk of w", "index/zarr.json": b"{}"}

EVERY = {
    "killed": every_crash_point,
    "error": every_error_point,
    "disk gone": lambda *arguments: every_error_point(*arguments, persistent=True),
}


@pytest.fixture
def make_store(store: LocalStore, commit_step: CommitStep, tmp_path: Path) -> MakeStore:
    """Copies of a root with steps 1, 2 and 3, the third with damage, and what two dead writers left."""
    for step in (1, 2, 3):
        commit_step(step, files=FILES)
    Path(store.root, "step-00000003/state/w/c.0").write_bytes(b"damaged!!!")
    for nonce in ("one", "two"):
        StepWriter.begin(store, 4, nonce).put("state/w/zarr.json", b"{w}")
    store.put("step-00000005/state/w/zarr.json", b"half deleted")
    numbers = itertools.count()

    def make() -> LocalStore:
        return LocalStore(shutil.copytree(store.root, tmp_path / f"copy-{next(numbers)}"))

    return make


def require_sound(store: LocalStore, intact: set[int], maybe: set[int]) -> set[int]:
    """Which steps of *maybe* are offered besides *intact*; all that are offered but 3 must be whole."""
    offered = {committed.step for committed in Catalog(store).committed()}
    assert intact <= offered <= intact | maybe
    catalog = Catalog(store)
    catalog.committed()
    assert catalog.damaged == ()
    for step in offered - {3}:
        assert verify_step(CommittedStep(store, step)).ok
    if 3 in offered:
        assert [damage.key for damage in verify_step(CommittedStep(store, 3)).damaged] == ["state/w/c.0"]
    return offered - intact


def require_cleanable(store: LocalStore, offered: set[int]) -> None:
    """The next run removes what is no step, and nothing else."""
    clean_partials(store)
    names = {f"step-{step:08}" for step in offered}
    assert {entry.name for entry in store.entries("")} == {".asyncckpt", *names}
    assert store.entries(".asyncckpt/partial") == []
    require_sound(store, offered, set())


@pytest.mark.parametrize("kind", EVERY)
def test_deleting_a_step(make_store: MakeStore, kind: str) -> None:
    def check(store: LocalStore, point: FaultPoint) -> None:
        left = require_sound(store, {1, 3}, {2})
        if point.raised is None:
            assert left == set()
        require_cleanable(store, {1, 3} | left)

    points = EVERY[kind](make_store, lambda store: CommittedStep(store, 2).delete(), check)
    # Both deletions: of the header alone, and of the rest.
    assert [str(point.call) for point in points if (point.call.name, point.moment) == ("delete", "halfway")] == [
        "delete('step-00000002/zarr.json')",
        "delete('step-00000002')",
    ]


@pytest.mark.parametrize("kind", EVERY)
def test_retention(make_store: MakeStore, kind: str) -> None:
    def prune(store: Store) -> None:
        infos = [committed.info for committed in Catalog(store).committed()]
        execute_retention(store, plan_retention(infos, Keep(last=1), datetime.now(UTC)))

    def check(store: LocalStore, point: FaultPoint) -> None:
        left = require_sound(store, {3}, {1, 2})
        # A step whose header cannot be read is damaged: it does not count, and is not removed either.
        if point.raised is None and point.call.name != "read":
            assert left == set()
        if isinstance(point.raised, SimulatedCrash):
            assert left != {1}, "the oldest goes first"
        require_cleanable(store, {3} | left)

    EVERY[kind](make_store, prune, check)


def test_retention_goes_on_after_an_error(make_store: MakeStore) -> None:
    plan = RetentionPlan(remove=(Decision(2, "test"), Decision(1, "test")))

    def check(store: LocalStore, point: FaultPoint) -> None:
        step = point.call.key[: len("step-00000001")]
        offered = {committed.step for committed in Catalog(store).committed()}
        if not step.startswith("step-"):  # what is kept could not be made durable
            assert {1, 2} <= offered, "nothing may be removed"
            return
        assert offered & {1, 2} <= {int(step.removeprefix("step-"))}, "only the step that met the error may be left"

    every_error_point(make_store, lambda store: execute_retention(store, plan), check)


@pytest.mark.parametrize("kind", EVERY)
def test_setting_a_damaged_step_aside(make_store: MakeStore, kind: str) -> None:
    whole = files_below(make_store(), "step-00000003")

    def check(store: LocalStore, point: FaultPoint) -> None:
        left = require_sound(store, {1, 2}, {3})
        aside = store.entries(".asyncckpt/damaged")
        # Wherever it is, it is there as a whole: nothing of it is lost.
        assert len(aside) + len(left) == 1
        where = "step-00000003" if left else f".asyncckpt/damaged/{aside[0].name}"
        assert files_below(store, where) == whole
        if point.raised is None:
            assert not left
        require_cleanable(store, {1, 2} | left)
        assert len(store.entries(".asyncckpt/damaged")) == len(aside)

    EVERY[kind](make_store, lambda store: quarantine_step(store, 3), check)


@pytest.mark.parametrize("kind", EVERY)
def test_cleaning_what_dead_writers_left(make_store: MakeStore, kind: str) -> None:
    def check(store: LocalStore, point: FaultPoint) -> None:
        require_sound(store, {1, 2, 3}, set())
        if point.raised is None:
            assert store.entries(".asyncckpt/partial") == store.entries("step-00000005") == []
        require_cleanable(store, {1, 2, 3})

    points = EVERY[kind](make_store, clean_partials, check)
    assert {point.call.key for point in points if point.call.name == "delete"} == {
        ".asyncckpt/partial/step-00000004-one/zarr.json",
        ".asyncckpt/partial/step-00000004-one",
        ".asyncckpt/partial/step-00000004-two/zarr.json",
        ".asyncckpt/partial/step-00000004-two",
        "step-00000005",
    }


@pytest.mark.parametrize("kind", EVERY)
def test_saving_a_step_beside_others(make_store: MakeStore, kind: str) -> None:
    """The step that a restore fell back from is set aside and saved again; the interrupted one is replaced."""

    def save_again(store: Store) -> None:
        quarantine_step(store, 3)
        writer = StepWriter.begin(store, 5, "nonce")
        writer.put("state/w/zarr.json", b"{w}")
        writer.abort()

    def check(store: LocalStore, point: FaultPoint) -> None:
        left = require_sound(store, {1, 2}, {3})
        require_cleanable(store, {1, 2} | left)

    EVERY[kind](make_store, save_again, check)


def files_below(store: LocalStore, prefix: str) -> dict[str, bytes]:
    root = Path(store.root, prefix)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
