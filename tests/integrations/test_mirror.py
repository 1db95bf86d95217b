"""A second root: copies in the background, and restores when the first root is damaged or gone."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt as ac
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.repository import RunLock, prepare_root
from asyncckpt.stores import LocalStore
from asyncckpt.testing import kill_writer
from asyncckpt.writer import mirroring
from asyncckpt.writer.pace import CopyStoppedError, Pace
from tests.event_log import EventLog

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

TIMEOUT_S = 60
THREAD = ac.Writer(kind="thread")
KEEP_ALL = ac.Keep(last=None)


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(600_000, generator=generator), "b": torch.randn(300, generator=generator), "step": step}


def require_state(state: dict[str, Any], step: int) -> None:
    expected = state_of(step)
    assert state["step"] == step
    assert torch.equal(state["w"], expected["w"])
    assert torch.equal(state["b"], expected["b"])


def require_whole(root: Path, steps: list[int]) -> None:
    catalogue = ac.open(root)
    assert [info.step for info in catalogue.checkpoints()] == steps
    for step in steps:
        assert catalogue.verify(step).ok
        require_state(catalogue.load(step), step)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it may be linked from other steps
    path.write_bytes(data)


@contextlib.contextmanager
def copies_blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies wait at their first file until the block ends; yields what is set when one does."""
    original, reached, opened = LocalStore.read_into, threading.Event(), threading.Event()

    def read_into(*arguments: Any, **options: Any) -> int:
        reached.set()
        assert opened.wait(TIMEOUT_S)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read_into", read_into)
        try:
            yield reached
        finally:
            opened.set()


# Copying


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_what_is_saved_arrives_on_the_mirror(tmp_path: Path, events: EventLog, kind: Any) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    options = ac.Mirror(mirror, keep=ac.Keep(last=2, every_steps=4))
    with ac.Checkpointer(
        root, keep=ac.Keep(last=1), mirror=options, writer=ac.Writer(kind=kind), on_event=events
    ) as ckpt:
        for step in range(6):
            ckpt.save(step, state_of(step)).result(TIMEOUT_S)
            assert events.wait("mirror.copied", step).fields["copied_bytes"] > 0
        assert ckpt.statistics().num_mirrored == 6
        assert ckpt.statistics().mirrored_bytes > 6 * 2_000_000
    require_whole(root, [5])
    require_whole(mirror, [0, 4, 5])
    assert ckpt.health().mirror == ac.MirrorHealth(newest=5)
    assert events.steps("mirror.pruned") == [1, 2, 3]
    assert events.steps("mirror.failed") == events.steps("mirror.skipped") == []
    assert ac.open(mirror).latest.nonce == ac.open(root).latest.nonce  # type: ignore[union-attr]


def test_without_a_mirror_nothing_is_said_of_one(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, state_of(1), writer=THREAD) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        assert ckpt.health().mirror is None


def test_closing_waits_for_the_newest_step(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path / "root", mirror=tmp_path / "mirror") as ckpt:
        ckpt.save(1, state_of(1))
    require_whole(tmp_path / "mirror", [1])


def test_a_mirror_is_caught_up_with_newest_first(tmp_path: Path, events: EventLog) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    with ac.Checkpointer(root, keep=KEEP_ALL, writer=THREAD) as ckpt:
        for step in range(4):
            ckpt.save(step, state_of(step)).result(TIMEOUT_S)
    options = ac.Mirror(mirror, keep=ac.Keep(last=2))
    with ac.Checkpointer(root, keep=KEEP_ALL, writer=THREAD, mirror=options, on_event=events):
        events.wait("mirror.copied", 2)
    assert events.steps("mirror.copied") == [3, 2]
    require_whole(mirror, [2, 3])
    require_whole(root, [0, 1, 2, 3])


def test_saves_go_on_beside_a_slow_mirror_which_skips_to_the_newest(
    tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    keep = ac.Keep(last=1)
    with ac.Checkpointer(root, keep=keep, writer=THREAD, mirror=mirror, on_event=events) as ckpt:
        with copies_blocked(monkeypatch) as reached:
            ckpt.save(1, state_of(1)).result(TIMEOUT_S)
            assert reached.wait(TIMEOUT_S)
            for step in (2, 3, 4):
                ckpt.save(step, state_of(step)).result(TIMEOUT_S)
            events.wait("checkpoint.pruned", 3)
            health = ckpt.health().mirror
            assert health is not None
            assert health.copying == 1
            assert [info.step for info in ckpt.checkpoints()] == [1, 4], "what is being copied stays until then"
        events.wait("mirror.copied", 4)
    assert events.steps("mirror.copied") == [1, 4]
    assert events.steps("mirror.skipped") == [2, 3]
    require_whole(mirror, [4])


def test_a_run_that_cannot_wait_leaves_the_copy_to_the_next_one(
    tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    options = ac.Mirror(mirror, close_timeout_s=0)
    ckpt = ac.Checkpointer(root, writer=THREAD, mirror=options)
    with copies_blocked(monkeypatch) as reached:
        ckpt.save(1, state_of(1)).result(TIMEOUT_S)
        assert reached.wait(TIMEOUT_S)
        with pytest.raises(TimeoutError, match="mirror is still being written"):
            ckpt.close(timeout=0.1)
    ckpt.close()
    assert "the run ends before steps [1] are on the mirror" in caplog.text
    assert ac.open(mirror).checkpoints() == []
    with ac.Checkpointer(root, writer=THREAD, mirror=mirror, on_event=events):
        events.wait("mirror.copied", 1)
    require_whole(mirror, [1])


@pytest.mark.parametrize("is_hanging", [False, True])
def test_who_is_told_to_stop_does_not_wait_for_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_hanging: bool
) -> None:
    root, mirror, stopped, stop = tmp_path / "root", tmp_path / "mirror", threading.Event(), Pace.stop

    def note_stop(pace: Pace) -> None:
        stop(pace)
        stopped.set()

    monkeypatch.setattr(Pace, "stop", note_stop)
    monkeypatch.setattr(mirroring, "_STOP_S", 0.1)
    options = ac.Mirror(mirror, close_timeout_s=3600)
    preemption = ac.Preemption(signals=(), grace=3600)
    ckpt = ac.Checkpointer(root, state_of(2), writer=THREAD, mirror=options, preemption=preemption)
    with copies_blocked(monkeypatch) as reached:
        ckpt.save(1, state_of(1)).result(TIMEOUT_S)
        assert reached.wait(TIMEOUT_S)
        ckpt.preempt()
        assert stopped.wait(TIMEOUT_S)
        ckpt.step(2)
        assert ckpt.preempted
        if is_hanging:
            ckpt.close(TIMEOUT_S)
    ckpt.close(TIMEOUT_S)
    assert "the run ends before steps [2, 1] are on the mirror" in caplog.text
    assert ac.open(mirror).checkpoints() == []
    require_whole(root, [1, 2])


def test_what_is_deleted_is_deleted_on_the_mirror(tmp_path: Path, events: EventLog) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    with ac.Checkpointer(root, writer=THREAD, mirror=mirror, on_event=events) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).result(TIMEOUT_S)
            events.wait("mirror.copied", step)
        ckpt.delete(2)
        assert events.wait("mirror.pruned", 2).fields["reason"] == "it was deleted in the first root"
        state = state_of(0)
        found = ckpt.restore(state=state)
        assert found is not None
        assert (found.step, found.from_mirror) == (1, False)
        ckpt.save(2, state_of(2)).result(TIMEOUT_S)
    require_whole(mirror, [1, 2])


def test_a_damaged_step_is_reported_and_the_next_one_mirrored(tmp_path: Path, events: EventLog) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    with ac.Checkpointer(root, writer=THREAD) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).result(TIMEOUT_S)
    flip(next(path for path in (root / "step-00000002/state/w").iterdir() if path.name != "zarr.json"))
    with ac.Checkpointer(root, writer=THREAD, mirror=mirror, on_event=events) as ckpt:
        failure = events.wait("mirror.failed", 2)
        assert failure.fields["error"] == CorruptCheckpointError.code
        events.wait("mirror.copied", 1)
        health = ckpt.health().mirror
        assert health is not None
        assert isinstance(health.error, CorruptCheckpointError)
        ckpt.save(3, state_of(3)).result(TIMEOUT_S)
        events.wait("mirror.copied", 3)
    assert events.steps("mirror.failed") == [2]
    require_whole(mirror, [1, 3])


# Mirrors in trouble


def test_training_goes_on_without_a_mirror_until_its_disk_is_there(
    tmp_path: Path, events: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    root, mirror = tmp_path / "root", tmp_path / "disk" / "mirror"
    with ac.Checkpointer(root, mirror=mirror, on_event=events) as ckpt:
        ckpt.save(1, state_of(1)).result(TIMEOUT_S)
        assert events.wait("mirror.failed").fields["error"] == ac.StorageError.code
        health = ckpt.health().mirror
        assert health is not None
        assert isinstance(health.error, ac.StorageError)
        assert not mirror.parent.exists(), "nothing is made where a disk may be missing"
        mirror.parent.mkdir()
        events.wait("mirror.copied", 1)
        health = ckpt.health().mirror
        assert health is not None
        assert health.error is None
    assert events.steps("mirror.failed") == [None], "it is said once"
    assert "mount its disk" in caplog.text
    require_whole(mirror, [1])


@pytest.mark.parametrize("what", ["foreign", "locked"])
def test_a_mirror_of_somebody_else_is_left_alone(tmp_path: Path, events: EventLog, what: str) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    lock = None
    if what == "foreign":
        mirror.mkdir()
        (mirror / "thesis.tex").write_text("done")
    else:
        lock = RunLock.acquire(prepare_root(mirror))
    before = sorted(mirror.rglob("*"))
    with ac.Checkpointer(root, writer=THREAD, mirror=mirror, on_event=events) as ckpt:
        ckpt.save(1, state_of(1)).result(TIMEOUT_S)
        error = events.wait("mirror.failed").fields["error"]
        assert error == (ac.ForeignRootError if what == "foreign" else ac.RootLockedError).code
    assert sorted(mirror.rglob("*")) == before
    if lock is not None:
        lock.release()


def test_a_mirror_inside_its_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ac.InvalidOptionError, match="elsewhere"):
        ac.Checkpointer(tmp_path / "root", mirror=tmp_path / "root" / "mirror")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "options",
    [{"root": 3}, {"root": "m", "mount": 3}, {"root": "m", "keep": 3}, {"root": "m", "close_timeout_s": -1}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ac.InvalidOptionError, match="Mirror"):
        ac.Mirror(**options)


def test_a_bug_in_mirroring_fails_no_save(tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("asyncckpt.writer.mirror_worker.plan_mirror", fail)
    with ac.Checkpointer(tmp_path / "root", writer=THREAD, mirror=tmp_path / "mirror", on_event=events) as ckpt:
        ckpt.save(1, state_of(1)).result(TIMEOUT_S)
        assert events.wait("mirror.failed").fields["message"] == "ZeroDivisionError: a bug"
        ckpt.save(2, state_of(2)).result(TIMEOUT_S)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process")
def test_writers_that_are_killed_while_they_copy(tmp_path: Path, events: EventLog) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    chance = random.Random(1)
    with ac.Checkpointer(root, keep=KEEP_ALL, mirror=mirror, on_event=events) as ckpt:
        for step in range(8):
            ckpt.save(step, state_of(step)).result(TIMEOUT_S)
            copied = len(events.steps("mirror.copied"))
            for _ in range(chance.randrange(1, 2000)):
                if len(events.steps("mirror.copied")) > copied:
                    break
            kill_writer(ckpt)
            for info in ac.open(mirror).checkpoints() if mirror.exists() else []:
                assert ac.open(mirror).verify(info.step).ok
        ckpt.save(8, state_of(8)).result(TIMEOUT_S)
        for step in range(9):
            if not (mirror / f"step-{step:08}").exists():
                events.wait("mirror.copied", step)
    require_whole(mirror, list(range(9)))
    require_whole(root, list(range(9)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process")
def test_the_writer_of_a_trainer_that_died_completes_the_mirror(tmp_path: Path) -> None:
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    code = f"""
import os, torch
import asyncckpt as ac
ckpt = ac.Checkpointer({str(root)!r}, {{"w": torch.ones(100_000)}}, mirror={str(mirror)!r})
ckpt.save(1).wait_staged()
os._exit(1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    RunLock.acquire(root, timeout_s=TIMEOUT_S).release()  # the writer keeps it until the end
    assert torch.equal(ac.load(mirror, 1)["w"], torch.ones(100_000))


def test_a_copy_gives_way_to_a_save_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, passed = Pace(), threading.Event()

    def copy() -> None:
        pace()
        passed.set()

    monkeypatch.setattr("asyncckpt.writer.pace._PAUSE_S", TIMEOUT_S)
    with pace.held():
        thread = threading.Thread(target=copy)
        thread.start()
        assert not passed.wait(0.05)
    assert passed.wait(TIMEOUT_S)
    thread.join()
    monkeypatch.setattr("asyncckpt.writer.pace._PAUSE_S", 0.01)
    with pace.held():
        pace()
    pace.stop()
    with pytest.raises(CopyStoppedError):
        pace()


# Restoring


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """Steps 1 to 3 in both roots; 1 is the best, 2 has a tag."""
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    with ac.Checkpointer(root, keep=KEEP_ALL, writer=THREAD, mirror=mirror) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state_of(step), metrics={"loss": step}, tags=["half"] if step == 2 else []).result(
                TIMEOUT_S
            )
    with ac.Checkpointer(root, keep=KEEP_ALL, writer=THREAD, mirror=mirror):
        pass  # at the end of a run only the newest is waited for; at its start all are copied
    events = EventLog()
    with ac.Checkpointer(root, keep=KEEP_ALL, writer=THREAD, mirror=mirror, on_event=events):
        for step in (1, 2, 3):
            if not (mirror / f"step-{step:08}").exists():
                events.wait("mirror.copied", step)
    require_whole(mirror, [1, 2, 3])
    return root, mirror


def damage(root: Path, step: int) -> None:
    flip(next(path for path in (root / f"step-{step:08}" / "state/w").iterdir() if path.name != "zarr.json"))


def destroy_header(root: Path, step: int) -> None:
    flip(root / f"step-{step:08}" / "zarr.json")


def remove_root(root: Path, step: int) -> None:
    shutil.rmtree(root)


def empty_root(root: Path, step: int) -> None:
    for path in root.iterdir():
        shutil.rmtree(path)


def remove_step(root: Path, step: int) -> None:
    shutil.rmtree(root / f"step-{step:08}")


LOSSES = [damage, destroy_header, remove_root, empty_root, remove_step]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("which", "step"), [("latest", 3), (3, 3), (2, 2), ("half", 2), ("best", 1)])
def test_what_the_first_root_lost_comes_from_the_mirror(
    roots: tuple[Path, Path], loss: Callable[[Path, int], None], which: int | str, step: int
) -> None:
    root, mirror = roots
    loss(root, step)
    state = state_of(0)
    keep = ac.Keep(last=None, best=ac.Best("loss"))
    with ac.Checkpointer(root, state, keep=keep, writer=THREAD, mirror=mirror) as ckpt:
        with pytest.warns(RuntimeWarning) as warned:
            found = ckpt.restore(which)
        assert any("from the mirror" in str(warning.message) for warning in warned)
        require_state(state, step)
        assert found is not None
        assert found.step == step
        assert found.from_mirror
        assert found.path == str(mirror / f"step-{step:08}")
        is_damaged = loss in (damage, destroy_header)
        assert found.fell_back_from == ((step,) if which == "latest" and is_damaged else ())
        ckpt.save(4, state_of(4)).result(TIMEOUT_S)
        if which == "latest":
            ckpt.save(3, state_of(3)).result(TIMEOUT_S)  # its number is free again
    assert ac.open(root).verify(4).ok
    require_state(ac.load(mirror, 4), 4)


def test_the_first_root_goes_first(roots: tuple[Path, Path]) -> None:
    root, mirror = roots
    state = state_of(0)
    with ac.Checkpointer(root, state, writer=THREAD, mirror=mirror) as ckpt:
        found = ckpt.restore()
    assert found is not None
    assert (found.step, found.from_mirror, found.path) == (3, False, str(root / "step-00000003"))


def test_when_both_copies_are_damaged_the_next_older_one_is_taken(roots: tuple[Path, Path]) -> None:
    root, mirror = roots
    damage(root, 3)
    damage(root, 2)
    damage(mirror, 3)
    state = state_of(0)
    with ac.Checkpointer(root, state, writer=THREAD, mirror=mirror) as ckpt:
        with pytest.warns(RuntimeWarning):
            found = ckpt.restore()
        assert found is not None
        assert (found.step, found.from_mirror, found.fell_back_from) == (2, True, (3, 2))
        require_state(state, 2)
        damage(mirror, 2)
        damage(root, 1)
        damage(mirror, 1)
        with pytest.raises(CorruptCheckpointError, match="and its mirror is damaged"):
            ckpt.restore()
        with pytest.raises(CorruptCheckpointError):
            ckpt.restore(1)


def test_a_checkpoint_that_was_replaced_is_not_brought_back(roots: tuple[Path, Path]) -> None:
    root, mirror = roots
    shutil.rmtree(root / "step-00000003")
    with ac.Checkpointer(root, keep=KEEP_ALL, writer=THREAD) as ckpt:
        ckpt.save(3, state_of(30)).result(TIMEOUT_S)
    damage(root, 3)
    state = state_of(0)
    options = ac.Mirror(mirror, mount=mirror / "never")  # so that the writer does not touch it
    with (
        ac.Checkpointer(root, state, keep=KEEP_ALL, writer=THREAD, mirror=options) as ckpt,
        pytest.warns(RuntimeWarning, match="without the mirror"),
        pytest.raises(CorruptCheckpointError),
    ):
        ckpt.restore(3)
    with ac.Checkpointer(root, state, keep=KEEP_ALL, writer=THREAD, mirror=mirror) as ckpt:
        with pytest.raises(CorruptCheckpointError):
            ckpt.restore(3)
        with pytest.warns(RuntimeWarning):
            found = ckpt.restore()
    assert found is not None
    assert (found.step, found.from_mirror, found.fell_back_from) == (2, False, (3,))
    require_state(state, 2)


def test_nothing_anywhere_is_a_fresh_run(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path / "root", state_of(0), writer=THREAD, mirror=tmp_path / "mirror") as ckpt:
        assert ckpt.restore() is None
        with pytest.raises(ac.CheckpointNotFoundError):
            ckpt.restore(3)


def test_a_mirror_is_a_root_like_any_other(roots: tuple[Path, Path]) -> None:
    _, mirror = roots
    for verb in (["ls", str(mirror)], ["verify", str(mirror)]):
        done = subprocess.run([sys.executable, "-m", "asyncckpt", *verb], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    state = state_of(0)
    with ac.Checkpointer(mirror, state, writer=THREAD) as ckpt:
        found = ckpt.restore()
        assert found is not None
        ckpt.save(4, state_of(4)).result(TIMEOUT_S)
    require_state(state, 3)
    assert os.path.isdir(mirror / "step-00000004")
