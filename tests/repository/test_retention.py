"""Carrying out a retention plan, whole and interrupted; the plan itself is tested in ``tests/unit``."""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncckpt.errors import StorageError
from asyncckpt.format.header import FORMAT, Header, encode_header_file
from asyncckpt.format.index import encode_index
from asyncckpt.format.tree import encode_value
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies import Best, Keep
from asyncckpt.policies.keep import rank_best
from asyncckpt.repository import (
    Catalog,
    CommittedStep,
    Decision,
    RetentionPlan,
    clean_partials,
    execute_retention,
    plan_retention,
    prepare_root,
)
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]
NOW = datetime(2026, 2, 1, tzinfo=UTC)
PARTIAL = ".asyncckpt/partial"
INDEX = encode_index([], rank=0)[2]
FILES = ("state/zarr.json", "state/w/zarr.json", "state/w/c.0", "index/zarr.json")


def test_the_plan_is_carried_out(store: LocalStore, commit_step: CommitStep) -> None:
    for step in (1, 2, 3, 4):
        commit_step(step, tags=["good"] if step == 2 else [])
    infos = [committed.info for committed in Catalog(store).committed()]
    plan = plan_retention(infos, Keep(last=1), datetime.now(UTC))
    assert execute_retention(store, plan) == [1, 3]
    assert Catalog(store).steps() == [2, 4]


def test_a_step_that_is_gone_is_no_error(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(1)
    plan = RetentionPlan(remove=(Decision(2, "test"), Decision(1, "test")))
    assert execute_retention(store, plan) == [1]


def test_a_failure_does_not_stop_the_others_and_is_raised(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        commit_step(step)
    real = store.delete

    def fail(key: str) -> None:
        if key.startswith("step-00000001"):
            raise StorageError("stuck", errno=errno.EBUSY)
        real(key)

    monkeypatch.setattr(store, "delete", fail)
    with pytest.raises(StorageError, match="stuck"):
        execute_retention(store, RetentionPlan(remove=(Decision(2, "test"), Decision(1, "test"))))
    assert Catalog(store).steps() == [1, 3]


class Crash(BaseException):
    """The process ends here."""


class Brittle:
    """A root whose n-th call fails; a deletion is one call per file and directory, with the header of a
    step last: the worst order that the contract allows.

    Args:
        path: the root.
        fail_at: which call; None never fails.
        error: what it raises. After a `Crash` every further call crashes, too: the process is dead.
    """

    def __init__(self, path: Path, fail_at: int | None = None, error: Callable[[], BaseException] = Crash) -> None:
        self._store = LocalStore(path)
        self._fail_at = fail_at
        self._error = error
        self.num_calls = 0

    @property
    def url(self) -> str:
        return self._store.url

    def location(self, key: str) -> str:
        return self._store.location(key)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self._call()
        return self._store.read(key, offset, length)

    def entries(self, prefix: str) -> Any:
        self._call()
        return self._store.entries(prefix)

    def sync_directory(self, prefix: str) -> None:
        self._call()  # what is flushed when is tested elsewhere

    def delete(self, prefix: str) -> None:
        path = Path(self.location(prefix))
        for below in sorted(path.iterdir()) if path.is_dir() else ():
            self.delete(f"{prefix}/{below.name}")
        self._call()
        self._store.delete(prefix)

    def _call(self) -> None:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number == self._fail_at or (self._error is Crash and self._fail_at is not None and number > self._fail_at):
            raise self._error()


def refused() -> StorageError:
    return StorageError("refused", errno=errno.EACCES)


def write_step(root: Path, step: int, **fields: Any) -> None:
    """A committed step, without the time it takes to make one durable."""
    values: dict[str, Any] = {
        "format": FORMAT, "step": step, "kind": "regular", "nonce": f"nonce-{step}", "run": "run",
        "created": NOW.isoformat(), "world_size": 1, "tags": [], "metrics": {}, "metadata": {}, "versions": {},
        "tree": {}, "inline": {}, "arrays": 1, "raw_bytes": 1, "stored_bytes": 1, "indexes": [INDEX], "timings": {},
    }  # fmt: skip
    top = root / f"step-{step:08}"
    for key in FILES:
        (top / key).parent.mkdir(parents=True, exist_ok=True)
        (top / key).write_bytes(b"{}")
    (top / "zarr.json").write_bytes(encode_header_file(Header(**{**values, **fields})))


def offered(root: Path) -> set[int]:
    """The steps a reader is offered; each of them is complete."""
    steps = {committed.step for committed in Catalog(LocalStore(root)).committed()}
    for step in steps:
        top = root / f"step-{step:08}"
        assert all((top / key).is_file() for key in FILES), f"step {step} is offered, half deleted"
    return steps


def leftovers(root: Path) -> list[str]:
    headless = [path.name for path in root.glob("step-*") if not (path / "zarr.json").exists()]
    return headless + [path.name for path in (root / PARTIAL).iterdir()]


def clean_at_start(root: Path, crash_at: int | None) -> None:
    """What the next run does first; it may itself die at a call, and then yet another one does it."""
    try:
        clean_partials(Brittle(root, crash_at))
    except Crash:
        clean_partials(Brittle(root))
    assert leftovers(root) == []


def plan(root: Path, keep: Keep) -> RetentionPlan:
    return plan_retention([found.info for found in Catalog(LocalStore(root)).committed()], keep, NOW)


KEEP = Keep(last=1, best=Best("loss"))


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    """Steps 1 to 5, of which `KEEP` keeps 5 (newest), 2 (best) and 4 (tagged)."""
    root = Path(prepare_root(tmp_path / "pristine").root)
    for step in range(1, 6):
        write_step(root, step, metrics={"loss": abs(step - 2.0)}, tags=["good"] if step == 4 else [])
    return root


@pytest.mark.parametrize("error", [Crash, refused])
def test_a_deletion_can_be_interrupted_at_any_call(
    tmp_path: Path, pristine: Path, error: Callable[[], BaseException]
) -> None:
    counted = tmp_path / "counted"
    shutil.copytree(pristine, counted)
    whole = Brittle(counted)
    assert execute_retention(whole, plan(counted, KEEP)) == [1, 3]
    assert whole.num_calls > 2 * len(FILES)
    for fail_at in range(whole.num_calls):
        root = tmp_path / str(fail_at)
        shutil.copytree(pristine, root)
        with pytest.raises((Crash, StorageError)):
            execute_retention(Brittle(root, fail_at, error), plan(root, KEEP))
        assert {2, 4, 5} <= offered(root)
        if error is refused:
            # The first two calls make what is kept durable; without that nothing is removed.
            assert len(offered(root)) <= 4 or fail_at < 2, "the step that did not fail was not removed"
        clean_at_start(root, crash_at=fail_at)
        again = plan(root, KEEP)
        assert {decision.step for decision in again.keep} == {2, 4, 5}
        execute_retention(LocalStore(root), again)
        assert (offered(root), leftovers(root), plan(root, KEEP).remove) == ({2, 4, 5}, [], ())
        shutil.rmtree(root)


@dataclass(frozen=True)
class Saved:
    """One save and what became of it, then a retention that dies at a call, or does not."""

    step: int
    fate: str
    created: datetime
    metrics: dict[str, Any]
    tags: list[str]
    crash_at: int | None
    cleaning_crash_at: int | None


anything = st.floats() | st.integers(-3, 3)
sequences = st.lists(
    st.builds(
        Saved,
        step=st.integers(0, 60),
        fate=st.sampled_from(["committed"] * 5 + ["partial", "damaged"]),
        # The clock may jump, back and forth.
        created=st.integers(-(10**8), 10**6).map(lambda seconds: NOW + timedelta(seconds=seconds)),
        metrics=st.just({}) | st.fixed_dictionaries({"loss": anything}),
        tags=st.lists(st.sampled_from(["a", "b"]), max_size=1),
        crash_at=st.none() | st.integers(0, 15),
        cleaning_crash_at=st.none() | st.integers(0, 10),
    ),
    min_size=2,
    max_size=8,
    unique_by=lambda saved: saved.step,
)
keeps = st.builds(
    Keep,
    last=st.sampled_from([1, 1, 2, 3, None]),
    every_steps=st.none() | st.integers(1, 40),
    every_seconds=st.none() | st.sampled_from([5e-324, 60.0, 1e6, 1e300]),
    best=st.none() | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 2)),
    tags=st.none() | st.sampled_from([(), ("a",)]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sequences, keeps)
def test_no_history_loses_a_checkpoint_that_matters(sequence: list[Saved], keep: Keep) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(prepare_root(Path(directory) / "root").root)
        present: set[int] = set()
        damaged: set[int] = set()
        for saved in sequence:
            save(root, saved)
            if saved.fate == "damaged":
                damaged.add(saved.step)
            elif saved.fate == "committed":
                present.add(saved.step)
            present = prune_and_check(root, keep, saved, present)
            assert all((root / f"step-{step:08}" / "state/w/c.0").exists() for step in damaged)


def save(root: Path, saved: Saved) -> None:
    write_step(
        root,
        saved.step,
        created=saved.created.isoformat(),
        metrics=encode_value(saved.metrics, "", lambda value, path: None),
        tags=saved.tags,
    )
    top = root / f"step-{saved.step:08}"
    if saved.fate == "partial":
        top.rename(root / PARTIAL / top.name)
    if saved.fate == "damaged":
        (top / "zarr.json").write_bytes(b"{")


def prune_and_check(root: Path, keep: Keep, saved: Saved, present: set[int]) -> set[int]:
    assert offered(root) == present
    infos = {found.step: found.info for found in Catalog(LocalStore(root)).committed()}
    intended = plan_retention(list(infos.values()), keep, NOW)
    must_stay = protected(infos, keep)
    try:
        execute_retention(Brittle(root, saved.crash_at), intended)
    except Crash:
        assert must_stay <= offered(root) <= present
        clean_at_start(root, saved.cleaning_crash_at)
        execute_retention(LocalStore(root), plan(root, keep))
    left = offered(root)
    assert must_stay <= left == {decision.step for decision in intended.keep}
    assert plan(root, keep).remove == ()
    return left


def protected(infos: dict[int, CheckpointInfo], keep: Keep) -> set[int]:
    """The newest, the tagged and the best, found in another way than the code does."""
    steps = {max(infos)} if infos else set()
    steps |= {
        step for step, info in infos.items() if (set(info.tags) if keep.tags is None else {*info.tags} & {*keep.tags})
    }
    if keep.best is not None:
        values = [float(value) for info in infos.values() if is_number(value := info.metrics.get("loss"))]
        if values:
            best = min(values) if keep.best.mode == "min" else max(values)
            ranked = rank_best(infos.values(), keep.best)
            assert ranked[0].metrics["loss"] == best
            steps.add(min(step for step, info in infos.items() if info.metrics.get("loss") == best))
    return steps


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) != 10**400 and not math.isnan(value)


def test_nothing_is_removed_before_what_is_kept_is_durable(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The newest step may come from a writer that was killed between its rename and the flush of it.
    for step in (1, 2):
        commit_step(step)

    def fail(key: str) -> None:
        raise StorageError(f"cannot flush {key!r}", errno=errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(store, "sync_directory", fail)
        with pytest.raises(StorageError, match="cannot flush ''"):
            execute_retention(store, RetentionPlan(remove=(Decision(1, "test"),)))
    assert Catalog(store).steps() == [1, 2]
