"""No memory left: for the writer, which says so or is replaced, and for the trainer, which the kernel kills."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import asyncckpt as ac

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit, memory cgroups and a writer process")

TIMEOUT_S = 60
TINY = {f"t{index}": torch.rand(2000) for index in range(2000)}
# Level 22 needs some hundred megabytes for large chunks, and next to nothing for small ones.
HUNGRY = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 22}}]


def take_memory_from_writer(ckpt: ac.Checkpointer) -> int:
    """Let the writer live on the memory it has already; its pid."""
    pid = ckpt.health().writer_pid
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        resource.prlimit(pid, limit, (2**20, 2**20))
    return pid


def test_a_save_that_cannot_be_encoded_fails_with_a_type_and_the_next_writer_takes_it(tmp_path: Path) -> None:
    large = {"w": torch.rand(2_000_000)}
    with ac.Checkpointer(tmp_path, TINY, compression=HUNGRY) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        starved = take_memory_from_writer(ckpt)
        with pytest.raises(ac.WriterError, match="not enough memory"):
            ckpt.save(2, large).result(TIMEOUT_S)
        assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())
        os.kill(starved, signal.SIGKILL)
        ckpt.save(2, {"w": torch.arange(10_000)}).result(TIMEOUT_S)
        assert ckpt.verify(2).ok


def test_a_writer_without_memory_for_a_message_is_replaced(tmp_path: Path) -> None:
    text = "x" * 30_000_000
    with ac.Checkpointer(tmp_path, TINY) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        starved = take_memory_from_writer(ckpt)
        ckpt.save(2, {"text": text}).result(TIMEOUT_S)
        assert ckpt.health().writer_pid != starved
        assert ckpt.load(2) == {"text": text}


def test_a_writer_without_memory_for_its_direct_io_writes_through_the_page_cache(tmp_path: Path) -> None:
    large = {"w": torch.rand(2_000_000)}
    with ac.Checkpointer(tmp_path, TINY) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        starved = take_memory_from_writer(ckpt)
        ckpt.save(2, large).result(TIMEOUT_S)
        assert ckpt.health().writer_pid == starved
        assert torch.equal(ckpt.load(2)["w"], large["w"])


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A group that may use 1 GiB. Making one is a right that tests have to be given by name."""
    parent = os.environ.get("ASYNCCKPT_TEST_MEMORY_CGROUP")
    if parent is None:
        pytest.skip("ASYNCCKPT_TEST_MEMORY_CGROUP does not name a memory cgroup in which to make another")
    group = Path(parent) / f"asyncckpt-test-{os.getpid()}"
    group.mkdir()
    try:
        limit = next(name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists())
        (group / limit).write_text(str(2**30))
        yield group
    finally:
        group.rmdir()


def test_a_staged_save_survives_the_out_of_memory_killer(tmp_path: Path, memory_cgroup: Path) -> None:
    trainer = subprocess.Popen(
        [
            "sh",
            "-c",
            f'echo $$ > {memory_cgroup}/cgroup.procs && exec "$0" -c "$1"',
            sys.executable,
            textwrap.dedent(f"""
            import os, signal, torch
            import asyncckpt as ac
            ckpt = ac.Checkpointer({str(tmp_path)!r}, {{"w": torch.arange(3_000_000)}})
            pid = ckpt.health().writer_pid
            os.kill(pid, signal.SIGSTOP)
            ckpt.save(1).wait_staged()
            os.kill(pid, signal.SIGCONT)
            print(pid, flush=True)
            hoard = []
            while True:
                hoard.append(b"x" * 2**24)
            """),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        assert trainer.stdout is not None
        writer = os.pidfd_open(int(trainer.stdout.readline()))
        assert trainer.wait(TIMEOUT_S) == -signal.SIGKILL
    try:
        assert select.select([writer], [], [], TIMEOUT_S)[0], "the writer is still there"
    finally:
        os.close(writer)
    events = next(
        memory_cgroup / name for name in ("memory.events", "memory.oom_control") if (memory_cgroup / name).exists()
    )
    assert "oom_kill 1" in events.read_text()
    assert ac.open(tmp_path).verify(1).ok
    assert torch.equal(ac.load(tmp_path, 1)["w"], torch.arange(3_000_000))
