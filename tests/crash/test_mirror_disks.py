"""Mirrors on a disk of their own: one that is full, hangs, or was not mounted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt as ac
from asyncckpt.repository import RunLock
from tests.crash.machine import frozen
from tests.event_log import EventLog

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems as Linux does")

TIMEOUT_S = 60


def make_state(step: int) -> dict[str, Any]:
    return {"w": torch.randn(2_000_000, generator=torch.Generator().manual_seed(step))}


@contextmanager
def tmpfs(point: Path, size: int) -> Iterator[None]:
    """A disk without the reserve that ext4 keeps for root, who may run the tests."""
    point.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(point)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not possible here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, timeout=TIMEOUT_S)


@contextmanager
def filled(disk: Path, leave_bytes: int) -> Iterator[None]:
    """Leave only *leave_bytes* while in the block."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
        os.fsync(file.fileno())
    try:
        yield
    finally:
        filler.unlink()


def test_a_full_mirror_fails_no_save_and_is_caught_up_with_when_there_is_room(
    tmp_path: Path, events: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    mirror = disk / "mirror"
    with tmpfs(disk, 64 * 2**20):
        with ac.Checkpointer(root, mirror=ac.Mirror(mirror, mount=disk), on_event=events) as ckpt:
            fill_up_and_make_room(ckpt, disk, events)
        assert "same file system" not in caplog.text
        for step in (1, 2, 3):
            assert ac.open(mirror).verify(step).ok
            assert torch.equal(ac.load(mirror, step)["w"], make_state(step)["w"])


def fill_up_and_make_room(ckpt: ac.Checkpointer, disk: Path, events: EventLog) -> None:
    mirror = disk / "mirror"
    ckpt.save(1, make_state(1)).result(TIMEOUT_S)
    events.wait("mirror.copied", 1)
    with filled(disk, leave_bytes=3 * 2**20):
        ckpt.save(2, make_state(2)).result(TIMEOUT_S)
        assert events.wait("mirror.failed", 2).fields["errno"] == errno.ENOSPC
        assert [info.step for info in ac.open(mirror).checkpoints()] == [1]
        assert ac.open(mirror).verify(1).ok
        assert list((mirror / ".asyncckpt/partial").iterdir()) == [], "what was written is given back"
        ckpt.save(3, make_state(3)).result(TIMEOUT_S)
        health = ckpt.health().mirror
        assert health is not None
        assert isinstance(health.error, ac.StorageError)
        assert health.error.errno == errno.ENOSPC
    events.wait("mirror.copied", 3)
    events.wait("mirror.copied", 2)


@pytest.mark.parametrize("size", [2**20, 12 * 2**20])
def test_a_mirror_too_small_for_one_step_is_only_a_mirror_too_small(
    tmp_path: Path, events: EventLog, size: int
) -> None:
    point = tmp_path / "disk"
    with tmpfs(point, size):
        with ac.Checkpointer(tmp_path / "root", mirror=point / "mirror", on_event=events) as ckpt:
            for step in (1, 2):
                ckpt.save(step, make_state(step)).result(TIMEOUT_S)
            events.wait("mirror.failed", 2)
            assert ckpt.verify(2).ok
        found = ac.open(point / "mirror").checkpoints()
        assert [info.step for info in found] == ([] if size < 2**21 else [1])
        assert all(ac.open(point / "mirror").verify(info.step).ok for info in found)


def test_a_disk_that_is_not_mounted_is_waited_for(tmp_path: Path, events: EventLog) -> None:
    point = tmp_path / "disk"
    point.mkdir()
    options = ac.Mirror(point / "mirror", mount=point)
    with ac.Checkpointer(tmp_path / "root", mirror=options, on_event=events) as ckpt:
        ckpt.save(1, make_state(1)).result(TIMEOUT_S)
        assert list(point.iterdir()) == []
        with tmpfs(point, 64 * 2**20):
            events.wait("mirror.copied", 1)
            assert ac.open(point / "mirror").verify(1).ok
        ckpt.save(2, make_state(2)).result(TIMEOUT_S)
        assert list(point.iterdir()) == []


def test_a_mirror_that_hangs_neither_stops_saves_nor_the_end_nor_the_next_run(
    tmp_path: Path, disk: Path, events: EventLog
) -> None:
    root, mirror = tmp_path / "root", disk / "mirror"
    options = ac.Mirror(mirror, close_timeout_s=0.1)
    with ac.Checkpointer(root, mirror=options, on_event=events) as ckpt:
        ckpt.save(1, make_state(1)).result(TIMEOUT_S)
        events.wait("mirror.copied", 1)
        with frozen(disk):
            for step in (2, 3):
                ckpt.save(step, make_state(step)).result(TIMEOUT_S)
            ckpt.close(TIMEOUT_S)
            RunLock.acquire(root).release()
            with ac.Checkpointer(root) as again:
                again.save(4, make_state(4)).result(TIMEOUT_S)
                assert again.verify(4).ok
    with ac.Checkpointer(root, mirror=mirror, on_event=events):
        events.wait("mirror.copied", 4)
    assert ac.open(mirror).verify(4).ok
