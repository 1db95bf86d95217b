"""Saves whose snapshot is complete only after ``save()`` has returned, as on CUDA devices."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt as ac
from asyncckpt.staging.stager import Copies, Stager

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

TIMEOUT_S = 60


class Device:
    """Stands in for copies that go on until `finish`; *error* is what the device then reports."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_waiting = 0
        self._finished = threading.Event()

    def finish(self) -> None:
        self._finished.set()

    def wait(self) -> None:
        self.num_waiting += 1
        assert self._finished.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    begin: Callable[..., Copies] = Stager.begin

    def begin_slowly(*args: Any) -> Copies:
        begin(*args).wait()
        return device

    monkeypatch.setattr(Stager, "begin", begin_slowly)
    yield device
    device.finish()


@pytest.fixture
def ckpt(tmp_path: Path) -> Iterator[ac.Checkpointer]:
    with ac.Checkpointer(tmp_path, {"w": torch.arange(8)}, writer=ac.Writer(kind="thread")) as ckpt:
        yield ckpt


def test_save_returns_before_the_snapshot_is_complete(ckpt: ac.Checkpointer, device: Device) -> None:
    saving = ckpt.save(1)
    with pytest.raises(TimeoutError):
        saving.wait_staged(0.01)
    assert not saving.staged
    device.finish()
    saving.wait_staged(TIMEOUT_S)
    saving.result(TIMEOUT_S)
    assert ckpt.load(1)["w"].tolist() == list(range(8))


def test_cancelling_before_the_snapshot_is_complete(ckpt: ac.Checkpointer, device: Device) -> None:
    saving = ckpt.save(1)
    assert saving.cancel()
    assert ckpt.health().free_slots == 0, "the device still writes to the slot"
    device.error = ac.SnapshotMutatedError("state/w was modified in place")  # nobody wants to know
    device.finish()
    ckpt.wait()
    device.error = None
    ckpt.save(1).result(TIMEOUT_S)
    statistics = ckpt.statistics()
    assert (statistics.num_cancelled, statistics.num_failed, statistics.num_durable) == (1, 0, 1)


@pytest.mark.parametrize("error", [ac.SnapshotMutatedError("state/w was modified"), ac.StagingError("CUDA error: 700")])
def test_an_error_of_the_device_fails_the_save_and_nothing_is_written(
    ckpt: ac.Checkpointer, device: Device, error: ac.CheckpointError
) -> None:
    device.error = error
    device.finish()
    saving = ckpt.save(1)
    assert saving.exception(TIMEOUT_S) is error
    assert saving.outcome == "failed"
    assert not saving.staged
    assert ckpt.checkpoints() == []
    device.error = None
    ckpt.save(1).result(TIMEOUT_S)


def test_restore_waits_for_saves_under_way(ckpt: ac.Checkpointer, device: Device) -> None:
    ckpt.save(1)
    restored: list[object] = []
    thread = threading.Thread(target=lambda: restored.append(ckpt.restore()))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    device.finish()
    thread.join(TIMEOUT_S)
    assert [info.step for info in restored] == [1]  # type: ignore[attr-defined]


def test_closing_waits_for_the_device_before_it_frees_memory(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    close = Stager.close
    monkeypatch.setattr(Stager, "close", lambda *args: (order.append("freed"), close(*args)))
    ckpt = ac.Checkpointer(tmp_path, {"w": torch.arange(8)}, writer=ac.Writer(kind="thread"))
    ckpt.save(1)
    with pytest.raises(TimeoutError):
        ckpt.close(timeout=0.05)
    assert order == []
    device.finish()
    ckpt.close(TIMEOUT_S)
    assert order == ["freed"]
    assert ac.load(tmp_path, 1)["w"].tolist() == list(range(8))


def test_a_full_slot_skips_while_the_device_copies(tmp_path: Path, device: Device) -> None:
    staging = ac.Staging(when_busy="skip")
    with ac.Checkpointer(tmp_path, {"w": torch.arange(8)}, staging=staging, writer=ac.Writer(kind="thread")) as ckpt:
        first = ckpt.save(1)
        assert ckpt.save(2).outcome == "skipped"
        device.finish()
        first.result(TIMEOUT_S)


def test_nothing_of_the_state_is_kept_after_the_save(tmp_path: Path, device: Device) -> None:
    with ac.Checkpointer(tmp_path, writer=ac.Writer(kind="thread")) as ckpt:
        tensor = torch.arange(8)
        gone = weakref.ref(tensor)
        saving = ckpt.save(1, {"w": tensor})
        device.finish()
        saving.result(TIMEOUT_S)
        del tensor
        gc.collect()
        assert gone() is None
