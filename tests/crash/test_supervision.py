"""Writers that are stopped, disks that fail or hang: what the trainer sees of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.errors import StorageError
from asyncckpt.stores import LocalStore
from tests.crash.machine import frozen

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process")

TIMEOUT_S = 60
THREAD = ac.Writer(kind="thread")


def test_a_stopped_writer_is_replaced_and_the_save_becomes_durable(tmp_path: Path) -> None:
    weights = torch.randn(1_000_000)
    with ac.Checkpointer(tmp_path, {"w": weights}) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        stopped = ckpt.health().writer_pid
        os.kill(stopped, signal.SIGSTOP)
        saving = ckpt.save(2)
        saving.result(TIMEOUT_S)
        assert ckpt.health().writer_pid != stopped
        assert torch.equal(ckpt.load(2)["w"], weights)


def test_a_writer_that_goes_on_in_time_is_left_alone(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(1000)}) as ckpt:
        pid = ckpt.health().writer_pid
        os.kill(pid, signal.SIGSTOP)
        saving = ckpt.save(1)
        saving.wait_staged()
        os.kill(pid, signal.SIGCONT)
        saving.result(TIMEOUT_S)
        assert ckpt.health().writer_pid == pid


def test_a_save_larger_than_the_socket_does_not_hang_on_a_stopped_writer(tmp_path: Path) -> None:
    # Its description alone fills the socket, so that sending it blocks until the writer is replaced.
    state = {f"a long name for a tensor that says nothing, number {index}": torch.ones(1) for index in range(20_000)}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        stopped = ckpt.health().writer_pid
        os.kill(stopped, signal.SIGSTOP)
        ckpt.save(2).result(TIMEOUT_S)
        assert ckpt.health().writer_pid != stopped


def test_a_job_that_was_suspended_as_a_whole_goes_on_with_its_writer(tmp_path: Path) -> None:
    # Both are stopped, and the trainer goes on first: the writer's silence says nothing about the writer.
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import os, sys, torch
import asyncckpt as ac
with ac.Checkpointer({str(tmp_path)!r}, {{"w": torch.ones(1000)}}) as ckpt:
    ckpt.save(1).result()
    pid = ckpt.health().writer_pid
    print(pid, flush=True)
    sys.stdin.readline()
    ckpt.save(2).result()
    print(ckpt.health().writer_pid == pid, flush=True)
""",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        assert trainer.stdout is not None
        assert trainer.stdin is not None
        writer_pid = int(trainer.stdout.readline())
        for pid in (writer_pid, trainer.pid):
            os.kill(pid, signal.SIGSTOP)
        for pid in (trainer.pid, writer_pid):
            os.kill(pid, signal.SIGCONT)
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "True\n"
    assert trainer.returncode == 0


# Storage that fails. The thread writer runs the same pipeline, and a test can reach its store.


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, method: str, code: int, times: int) -> Iterator[list[str]]:
    """The first *times* calls of a store's *method* fail with *code*; yields the keys of all calls."""
    original = getattr(LocalStore, method)
    keys: list[str] = []

    def call(store: LocalStore, key: str, *rest: object, **options: object) -> object:
        keys.append(key)
        if len(keys) <= times:
            raise StorageError(os.strerror(code), errno=code, key=key)
        return original(store, key, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, method, call)
        yield keys


@pytest.mark.parametrize("method", ["put", "sync_directory", "rename"])
def test_a_transient_error_is_written_again_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10_000)}, writer=THREAD) as ckpt:
        with failing(monkeypatch, method, errno.EIO, times=2) as keys:
            ckpt.save(1).result(TIMEOUT_S)
        assert ckpt.verify(1).ok
        partials = {key.split("/")[2] for key in keys if key.startswith(".asyncckpt/partial/")}
        assert len(partials) == 3, "each attempt has a directory of its own"
    assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())


def test_a_transient_error_that_stays_is_reported_with_its_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asyncckpt.writer.retry.RETRY_DELAYS_S", (0.0, 0.0))
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10_000)}, writer=THREAD) as ckpt:
        with failing(monkeypatch, "rename", errno.EIO, times=99) as keys:
            saving = ckpt.save(1)
            with pytest.raises(ac.StorageError) as raised:
                saving.result(TIMEOUT_S)
        assert raised.value.errno == errno.EIO
        assert len(keys) == 3
        assert "step 1 was not saved" in caplog.text
        ckpt.save(1).result(TIMEOUT_S)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_permanent_error_fails_at_once_and_gives_the_space_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10_000)}, writer=THREAD) as ckpt:
        with failing(monkeypatch, "rename", code, times=99) as keys, pytest.raises(ac.StorageError) as raised:
            ckpt.save(1).result(TIMEOUT_S)
        assert raised.value.errno == code
        assert len(keys) == 1
        assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())
        ckpt.save(1).result(TIMEOUT_S)


def test_a_step_whose_final_flush_failed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LocalStore.sync_directory

    def fail_for_root(store: LocalStore, prefix: str) -> None:
        if prefix == "":
            raise StorageError("no", errno=errno.EROFS, key=prefix)
        original(store, prefix)

    with ac.Checkpointer(tmp_path, {"w": torch.ones(10_000)}, writer=THREAD) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "sync_directory", fail_for_root)
            with pytest.raises(ac.StorageError):
                ckpt.save(1).result(TIMEOUT_S)
            assert ckpt.latest is None
        ckpt.save(1).result(TIMEOUT_S)


@pytest.mark.parametrize("call", ["step", "save"])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_error_nobody_looked_at_is_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, on_error: str
) -> None:
    options = ac.Writer(kind="thread", on_error=on_error)  # type: ignore[arg-type]
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}, writer=options) as ckpt:
        ended = threading.Event()
        with failing(monkeypatch, "rename", errno.ENOSPC, times=1):
            ckpt.save(1).add_done_callback(lambda _: ended.set())
            assert ended.wait(TIMEOUT_S)
        if on_error == "raise":
            with pytest.raises(ac.StorageError, match="No space"):
                getattr(ckpt, call)(2)
        else:
            with pytest.warns(RuntimeWarning, match="No space"):
                getattr(ckpt, call)(2)
        ckpt.save(3).result(TIMEOUT_S)


# A disk that hangs.


def test_training_goes_on_beside_a_hung_disk_and_close_keeps_its_word(disk: Path) -> None:
    state = {"w": torch.ones(100_000)}
    ckpt = ac.Checkpointer(disk / "run", state, when=ac.Every(steps=1), staging=ac.Staging(slots=2))
    with frozen(disk):
        saves = [ckpt.step(step) for step in (1, 2)]
        for saving in saves:
            assert saving is not None
            saving.wait_staged(TIMEOUT_S)
        with pytest.raises(TimeoutError, match=r"steps \[1, 2\]"):
            ckpt.close(timeout=0.5)
        assert [saving.outcome for saving in saves if saving] == ["pending", "pending"]
    ckpt.close(TIMEOUT_S)
    assert [saving.outcome for saving in saves if saving] == ["durable", "durable"]


def test_a_disk_that_hangs_too_long_fails_the_save_and_the_next_one_works(disk: Path) -> None:
    options = ac.Writer(stall_timeout_s=2.0)
    with ac.Checkpointer(disk / "run", {"w": torch.ones(100_000)}, writer=options) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        with frozen(disk):
            with pytest.raises(ac.StorageError) as raised:
                ckpt.save(2).result(TIMEOUT_S)
            assert raised.value.errno == errno.ETIMEDOUT
        ckpt.save(2).result(TIMEOUT_S)
        assert ckpt.verify(2).ok
