"""Mistakes get a typed error that says what to do, and lose nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt as ac


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A root with a committed step 1."""
    root = tmp_path / "run"
    with ac.Checkpointer(root, {"w": torch.arange(2_000_000)}) as ckpt:
        ckpt.save(1).result(timeout=60)
    return root


def test_root_below_a_file_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ac.CheckpointError):
        ac.Checkpointer(tmp_path / "file" / "run", {"w": torch.ones(1)})


def test_unwritable_root() -> None:
    # /proc refuses new directories to everybody, root included.
    with pytest.raises(ac.StorageError) as caught:
        ac.Checkpointer("/proc/asyncckpt-run", {"w": torch.ones(1)})
    assert caught.value.errno is not None


def test_root_that_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ac.ForeignRootError, match="thesis"):
        ac.Checkpointer(tmp_path, {"w": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_second_run_on_the_same_root_is_refused_and_names_the_first(saved: Path) -> None:
    with ac.Checkpointer(saved, {"w": torch.ones(1)}) as first:
        with pytest.raises(ac.RootLockedError, match=str(os.getpid())):
            ac.Checkpointer(saved, {"w": torch.ones(1)})
        first.save(2).result(timeout=60)
    ac.Checkpointer(saved, {"w": torch.ones(1)}).close()


def test_second_run_in_another_process_is_refused(saved: Path) -> None:
    with ac.Checkpointer(saved, {"w": torch.ones(1)}):
        script = f"""
import asyncckpt as ac
try:
    ac.Checkpointer({str(saved)!r})
except ac.RootLockedError:
    print("locked")
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "locked\n", done.stderr


def test_step_that_exists(saved: Path) -> None:
    with ac.Checkpointer(saved, {"w": torch.ones(1)}) as ckpt:
        with pytest.raises(ac.StepExistsError, match="step 1"):
            ckpt.save(1)
        ckpt.delete(1)
        ckpt.save(1).result(timeout=60)


def test_step_that_is_being_saved(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(1)}) as ckpt:
        ckpt.save(1)
        with pytest.raises(ac.StepExistsError):
            ckpt.save(1)


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, None])
def test_step_that_is_no_step(tmp_path: Path, step: Any) -> None:
    with (
        ac.Checkpointer(tmp_path, {"w": torch.ones(1)}) as ckpt,
        pytest.raises(ac.InvalidOptionError, match="whole number"),
    ):
        ckpt.save(step)


def test_nothing_to_save_or_to_restore_into(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(ac.InvalidOptionError, match="nothing to save"):
            ckpt.save(1)
        with pytest.raises(ac.InvalidOptionError, match="nothing to restore"):
            ckpt.restore()


def test_unsupported_object_names_its_path_and_the_slot_stays_usable(tmp_path: Path) -> None:
    state: dict[str, Any] = {"ok": torch.ones(1), "deep": {"list": [1, object()]}}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        with pytest.raises(ac.UnsupportedStateError, match=r"deep/list/1.*object"):
            ckpt.save(1)
        del state["deep"]
        ckpt.save(1).result(timeout=60)


def test_unknown_codec(tmp_path: Path) -> None:
    with pytest.raises(ac.InvalidOptionError):
        ac.Checkpointer(tmp_path / "run", compression=[{"name": "rot13"}])
    with pytest.raises(ac.InvalidOptionError):
        ac.Checkpointer(tmp_path / "run", compression="huge")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_memory_limit_smaller_than_a_tensor(tmp_path: Path) -> None:
    state = {"w": torch.ones(1000)}
    with (
        ac.Checkpointer(tmp_path, state, staging=ac.Staging(memory_limit=1000)) as ckpt,
        pytest.raises(ac.InvalidOptionError, match="memory_limit is too small"),
    ):
        ckpt.save(1)


def test_restore_into_another_shape_changes_nothing(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"model": nn.Linear(4, 4), "x": torch.ones(3)}) as ckpt:
        ckpt.save(1).result(timeout=60)
    other = nn.Linear(4, 5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    target = {"model": other, "x": torch.zeros(3), "y": torch.zeros(1)}
    with ac.Checkpointer(tmp_path, target) as ckpt:
        with pytest.raises(ac.StateMismatchError) as caught:
            ckpt.restore()
        assert set(caught.value.fields["mismatched"]) == {"model/weight", "model/bias"}
        assert caught.value.fields["missing"] == ["y"]
        assert all(torch.equal(other.state_dict()[key], value) for key, value in before.items())
        assert not target["x"].any()
        found = ckpt.restore(strict=False)
        assert found is not None
        assert found.mismatch.missing == ("y",)
        assert target["x"].all()


def test_only_restores_what_it_names(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"a": torch.ones(3), "b": {"c": torch.ones(3), "d": torch.ones(2)}}) as ckpt:
        ckpt.save(1).result(timeout=60)
        state = {"a": torch.zeros(3), "b": {"c": torch.zeros(3), "d": torch.zeros(2)}}
        ckpt.restore(1, state=state, only="b/c")
        assert (state["a"].sum(), state["b"]["c"].sum(), state["b"]["d"].sum()) == (0, 3, 0)
        assert ckpt.load(1, only=["b/*"]).keys() == {"b"}


@pytest.mark.parametrize("which", [2, "best", "some-tag"])
def test_checkpoint_that_is_not_there(saved: Path, which: int | str) -> None:
    with ac.Checkpointer(saved, {"w": torch.arange(2_000_000)}) as ckpt:
        with pytest.raises(ac.CheckpointNotFoundError):
            ckpt.restore(which)
        with pytest.raises(ac.CheckpointNotFoundError):
            ckpt.load(which)


def damage(root: Path, step: int) -> None:
    """Cut the largest file of a step short."""
    files = [path for path in (root / f"step-{step:08d}").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_truncated_file_is_named(saved: Path) -> None:
    damage(saved, 1)
    with ac.Checkpointer(saved, {"w": torch.zeros(2_000_000, dtype=torch.int64)}) as ckpt:
        with pytest.raises(ac.CorruptCheckpointError, match="state/w"):
            ckpt.restore(1)
        with pytest.raises(ac.CorruptCheckpointError):
            ckpt.restore()
        report = ckpt.verify(1)
    assert not report.ok
    assert report.damaged[0].key.startswith("state/w/")


def test_latest_falls_back_over_a_damaged_step_and_its_number_can_be_saved_again(saved: Path) -> None:
    weights = torch.arange(2_000_000)
    with ac.Checkpointer(saved, {"w": weights + 1}) as ckpt:
        ckpt.save(2).result(timeout=60)
    damage(saved, 2)
    state = {"w": torch.zeros_like(weights)}
    with ac.Checkpointer(saved, state) as ckpt:
        with pytest.warns(RuntimeWarning, match="step 2 is damaged"):
            found = ckpt.restore()
        assert found is not None
        assert (found.step, found.fell_back_from) == (1, (2,))
        assert torch.equal(state["w"], weights)
        ckpt.save(2).result(timeout=60)
        assert ckpt.verify(2).ok
    assert len(list((saved / ".asyncckpt" / "damaged").iterdir())) == 1


def test_checkpoint_of_a_newer_version_is_not_fallen_back_from(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ac.Checkpointer(saved, {"w": torch.ones(2)}) as ckpt:
        ckpt.save(2).result(timeout=60)
    from asyncckpt.repository import catalog

    decode = catalog.decode_header_file

    def newer(data: bytes) -> Any:
        header = decode(data)
        if header.step == 2:
            raise ac.UnsupportedFormatError("format 99 is newer than this asyncckpt reads")
        return header

    monkeypatch.setattr(catalog, "decode_header_file", newer)
    with (
        ac.Checkpointer(saved, {"w": torch.zeros(2)}) as ckpt,
        pytest.raises(ac.UnsupportedFormatError),
    ):
        ckpt.restore()
    assert (saved / "step-00000002").is_dir()


def test_failed_save_that_nobody_looked_at_is_raised_by_step_and_by_close(tmp_path: Path) -> None:
    ckpt = ac.Checkpointer(tmp_path, {"w": torch.ones(10)})
    break_partial_directory(tmp_path)
    ckpt.save(1)
    with pytest.raises(ac.StorageError):
        ckpt.wait(timeout=60)
    ckpt.save(2)
    with pytest.raises(ac.StorageError):
        ckpt.close()
    ckpt.close()


def test_failed_save_only_warns_when_asked_to(tmp_path: Path) -> None:
    ckpt = ac.Checkpointer(tmp_path, {"w": torch.ones(10)}, writer=ac.Writer(on_error="warn"))
    break_partial_directory(tmp_path)
    ckpt.save(1)
    with pytest.warns(RuntimeWarning, match="a checkpoint was lost"):
        ckpt.close()


def test_failed_save_that_was_looked_at_is_not_raised_again(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}) as ckpt:
        break_partial_directory(tmp_path)
        saving = ckpt.save(1)
        with pytest.raises(ac.StorageError) as caught:
            saving.result(timeout=60)
        assert caught.value.errno is not None
        assert saving.outcome == "failed"


def break_partial_directory(root: Path) -> None:
    """Put a file where the partial directory is, so that every write fails with ENOTDIR."""
    partial = root / ".asyncckpt" / "partial"
    partial.rmdir()
    partial.write_text("")


def test_a_snapshot_that_cannot_be_handed_over_fails_its_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(3)}) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(ckpt._saves, "_submit", lambda *_, **__: 1 / 0)
            with pytest.raises(ac.WriterError, match="ZeroDivisionError"):
                ckpt.save(1).result(timeout=60)
        ckpt.save(1).result(timeout=60)


@pytest.mark.parametrize("value", [None, "low", [1.0], 10**400])
def test_a_metric_that_is_no_number(saved: Path, value: Any) -> None:
    with ac.Checkpointer(saved, {"w": torch.ones(3)}) as ckpt:
        with pytest.raises(ac.InvalidOptionError, match="metrics are numbers"):
            ckpt.save(7, metrics={"loss": value})
        ckpt.save(7, metrics={"loss": torch.tensor(0.5)}).result(timeout=60)  # type: ignore[dict-item]
        assert ckpt.latest is not None
        assert ckpt.latest.metrics == {"loss": 0.5}


@pytest.mark.parametrize("tags", ["best-so-far", ["a", 3], [""], ["latest"], ["best"], 3, [None]])
def test_wrong_tags_are_refused_and_the_next_save_is_written(tmp_path: Path, tags: Any) -> None:
    # One that is no text used to end the writer, and each one started in its place, for good.
    with ac.Checkpointer(tmp_path / "run", {"w": torch.ones(1)}) as ckpt:
        with pytest.raises(ac.InvalidOptionError, match="tag"):
            ckpt.save(1, tags=tags)
        assert ckpt.save(1, tags=["a", "b", "a"]).result(timeout=60).tags == ("a", "b")
        assert ckpt.health().writer_restarts == 0


@pytest.mark.parametrize("metrics", [[1.0], 1.0, {"x": torch.ones(2)}, {"x": torch.ones(1, device="meta")}, {"x": "y"}])
def test_wrong_metrics_are_refused(tmp_path: Path, metrics: Any) -> None:
    with ac.Checkpointer(tmp_path / "run", {"w": torch.ones(1)}) as ckpt:
        with pytest.raises(ac.InvalidOptionError, match="metrics"):
            ckpt.save(1, metrics=metrics)
        ckpt.save(1, metrics={"x": torch.tensor(0.5)}).result(timeout=60)


@pytest.mark.parametrize(
    "option",
    [
        {"when": 500},
        {"when": ac.Every},
        {"keep": 3},
        {"staging": {"slots": 2}},
        {"writer": "thread"},
        {"preemption": 15.0},
        {"preemption": True},
        {"metadata": 3},
        {"state": nn.Linear(1, 1)},
    ],
    ids=repr,
)
def test_an_option_of_the_wrong_type_is_refused_at_once_and_leaves_the_root_free(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    (name,) = option
    with pytest.raises(ac.InvalidOptionError, match=f"{name}= takes a"):
        ac.Checkpointer(tmp_path / "run", **{"state": {"w": torch.ones(1)}, **option})
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)
def test_what_would_wait_for_itself_in_a_callback_is_refused(tmp_path: Path) -> None:
    told: dict[str, BaseException] = {}
    begun = threading.Event()

    def on_event(event: ac.Event) -> None:
        if event.name != "save.durable" or event.step != 1:
            return
        begun.wait()  # the only slot is the one of step 2 by now, and step 3 waits for it
        for name, call in {
            "result": lambda: second.result(),
            "staged": lambda: second.wait_staged(),
            "wait": ckpt.wait,
            "close": ckpt.close,
            "save": lambda: ckpt.save(9),
        }.items():
            try:
                call()
            except ac.BusyError as error:
                told[name] = error

    with ac.Checkpointer(tmp_path / "run", {"w": torch.ones(1)}, on_event=on_event) as ckpt:
        ckpt.save(1)
        second = ckpt.save(2)
        begun.set()
        ckpt.save(3)
    assert {"result", "wait", "close", "save"} <= told.keys()
    assert [info.step for info in ac.open(tmp_path / "run").checkpoints()] == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads, from Python 3.12 on
@pytest.mark.timeout(60)
def test_a_forked_child_is_refused_and_the_parent_saves_on(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path / "run", {"w": torch.arange(1000)}) as ckpt:
        ckpt.save(1).result(timeout=60)
        child = os.fork()
        if child == 0:
            try:
                ckpt.save(2)
            except ac.ClosedError:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        ckpt.save(3).result(timeout=60)
    assert [info.step for info in ac.open(tmp_path / "run").checkpoints()] == [1, 3]
