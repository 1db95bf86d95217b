"""Disks that fill up, run out of inodes, become read-only or vanish under a save: real file systems, real errors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import asyncckpt as ac

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems as Linux does")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "disk_full.json"
DISK_BYTES = 64 * 2**20
NUM_OFFSETS = 20
DEADLINE_S = 5.0
SLACK_BYTES = 128 * 1024
"""Directories do not shrink, and ext4 keeps a block or two of its own."""
TIMEOUT_S = 60
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


@dataclass
class Disk:
    """A mounted file system of its own."""

    mount_point: Path

    @property
    def free_bytes(self) -> int:
        """What is left for files; ext4 keeps a reserve for itself that nobody can write to."""
        found = os.statvfs(self.mount_point)
        return found.f_bavail * found.f_frsize

    @contextmanager
    def filled(self, leave_bytes: int) -> Iterator[None]:
        """Leave only *leave_bytes* while in the block."""
        filler = self.mount_point / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free_bytes - leave_bytes)
            os.fsync(file.fileno())
        try:
            yield
        finally:
            filler.unlink()

    def make_read_only(self) -> None:
        """What ext4 does to itself when it meets an error, with ``errors=remount-ro``."""
        device = Path(_run("findmnt", "-n", "-o", "SOURCE", self.mount_point).strip()).name
        trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel cannot be told to meet an ext4 error")
        trigger.write_text("a test\n")

    def vanish(self) -> None:
        """From now on every access to the disk fails with EIO."""
        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        except OSError as error:
            pytest.skip(f"this kernel cannot shut ext4 down: {error}")
        finally:
            os.close(fd)


def _run(*command: str | Path) -> str:
    """Output of a command that a machine may not have or not allow."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        pytest.skip(f"{command[0]} is not allowed here: {ended.stderr.strip()}")
    return ended.stdout


@contextmanager
def mounted(at: Path, *options: str | Path) -> Iterator[Disk]:
    at.mkdir(exist_ok=True)
    _run("mount", *options, at)
    try:
        yield Disk(at)
    finally:
        subprocess.run(["umount", at], check=True)


def make_image(path: Path, *options: str) -> Path:
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", *options, path)
    return path


def make_state(num_small: int = 40, num_large: int = 2_000_000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    small = {f"layer.{number}": torch.randn(1000, generator=generator) for number in range(num_small)}
    return {**small, "embedding": torch.randn(num_large, generator=generator)}


def train(state: dict[str, torch.Tensor]) -> None:
    """Change everything: a file like one of the step before would be linked, and need no room."""
    for tensor in state.values():
        tensor.normal_()


def partials(root: Path) -> list[Path]:
    return list((root / ".asyncckpt" / "partial").iterdir())


@dataclass
class Run:
    """A checkpointer on a small disk, which has saved step 1."""

    disk: Disk
    checkpointer: ac.Checkpointer
    state: dict[str, torch.Tensor]
    save_bytes: int
    failed_after_s: list[float] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.disk.mount_point / "root"


@pytest.fixture(scope="module", params=["ext4", "tmpfs"])
def run(request: pytest.FixtureRequest, full: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("disk")
    if request.param == "ext4":
        options: tuple[str | Path, ...] = ("-o", "loop", make_image(directory / "disk.img"))
    else:
        options = ("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none")
    state = make_state()
    with (
        mounted(directory / "disk", *options) as disk,
        # Retention runs after a save, and would give space back while we measure.
        ac.Checkpointer(disk.mount_point / "root", state, keep=ac.Keep(last=None)) as checkpointer,
    ):
        free_bytes = disk.free_bytes
        checkpointer.save(1).result(TIMEOUT_S)
        found = Run(disk, checkpointer, state, free_bytes - disk.free_bytes)
        yield found
    if full:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[request.param] = {"save_bytes": found.save_bytes, "failed_after_s": found.failed_after_s}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


@pytest.mark.parametrize("offset", range(NUM_OFFSETS))
def test_full_disk_fails_the_save_soon_and_gets_its_space_back(run: Run, offset: int) -> None:
    checkpointer, disk = run.checkpointer, run.disk
    train(run.state)
    leave_bytes = run.save_bytes * (offset + 1) // (NUM_OFFSETS + 1)
    with disk.filled(leave_bytes):
        free_bytes = disk.free_bytes
        started = time.perf_counter()
        error = checkpointer.save(2).exception(timeout=DEADLINE_S)
        run.failed_after_s.append(round(time.perf_counter() - started, 3))
        assert isinstance(error, ac.StorageError)
        assert error.errno == errno.ENOSPC
        assert [info.step for info in checkpointer.checkpoints()] == [1]
        assert checkpointer.verify(1).ok
        assert partials(run.root) == []
        assert disk.free_bytes >= free_bytes - SLACK_BYTES
    checkpointer.save(2).result(TIMEOUT_S)
    assert checkpointer.verify(2).ok
    assert torch.equal(checkpointer.load(2)["embedding"], run.state["embedding"])
    checkpointer.delete(2)


def test_disk_without_inodes_fails_the_save(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img", "-N", "512")
    few, many = make_state(20, 1000), make_state(400, 1000)
    with (
        mounted(tmp_path / "disk", "-o", "loop", image) as disk,
        ac.Checkpointer(disk.mount_point / "root", keep=ac.Keep(last=None)) as checkpointer,
    ):
        checkpointer.save(1, few).result(TIMEOUT_S)
        free_inodes = os.statvfs(disk.mount_point).f_ffree
        error = checkpointer.save(2, many).exception(TIMEOUT_S)
        assert isinstance(error, ac.StorageError)
        assert error.errno == errno.ENOSPC
        assert os.statvfs(disk.mount_point).f_ffree == free_inodes
        assert checkpointer.verify(1).ok
        train(few)
        checkpointer.save(2, few).result(TIMEOUT_S)


@contextmanager
def writer_stopped_in_the_middle(checkpointer: ac.Checkpointer, root: Path) -> Iterator[ac.SaveFuture]:
    """A save of step 2 of which something, but not all, is written; goes on after the block."""
    for _ in range(50):
        pid = checkpointer.health().writer_pid
        saving = checkpointer.save(2)
        while not saving.done() and not any(found.glob("state/**/c.*") for found in partials(root)):
            pass
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        try:
            if not saving.done() and not (root / "step-00000002").exists():
                yield saving
                return
        finally:
            with suppress(ProcessLookupError):  # replaced, if it was stopped for too long
                os.kill(pid, signal.SIGCONT)
        saving.result(TIMEOUT_S)  # we were not given the processor soon enough
        checkpointer.delete(2)
    raise AssertionError("no save was caught in the middle")


@pytest.mark.parametrize("moment", ["before the save", "during the save"])
@pytest.mark.parametrize(("fault", "code"), [("make_read_only", errno.EROFS), ("vanish", errno.EIO)])
def test_broken_disk_fails_the_save_and_costs_nothing_that_was_acknowledged(
    tmp_path: Path, fault: str, code: int, moment: str
) -> None:
    image = make_image(tmp_path / "disk.img")
    mount = ("-o", "loop,errors=remount-ro", image)
    state = make_state()
    with mounted(tmp_path / "disk", *mount) as disk:
        root = disk.mount_point / "root"
        with ac.Checkpointer(root, state) as checkpointer:
            checkpointer.save(1).result(TIMEOUT_S)
            saved = state["embedding"].clone()
            train(state)
            if moment == "before the save":
                getattr(disk, fault)()
                saving = checkpointer.save(2)
            else:
                with writer_stopped_in_the_middle(checkpointer, root) as saving:
                    getattr(disk, fault)()
            error = saving.exception(TIMEOUT_S)
            assert isinstance(error, ac.StorageError)
            assert error.errno == code
            if fault == "make_read_only":
                assert checkpointer.verify(1).ok
    with mounted(tmp_path / "disk", *mount), ac.Checkpointer(root, make_state(num_large=1)) as checkpointer:
        assert partials(root) == [], "the next run removes what could not be removed"
        assert [info.step for info in checkpointer.checkpoints()] == [1]
        assert checkpointer.verify(1).ok
        assert torch.equal(checkpointer.load(1)["embedding"], saved)
        checkpointer.save(2).result(TIMEOUT_S)
