"""Under torchrun: the agent tears workers down, restarts them, and is told to stop; staged saves are committed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import asyncckpt as ac

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd and a writer process"),
    pytest.mark.timeout(300),
]

TIMEOUT_S = 120
WEIGHTS = torch.arange(1_000_000, dtype=torch.float32)

WORKER = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
import torch
import asyncckpt as ac

base = Path({base!r})
rank = int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
state = {{"w": torch.zeros(1_000_000)}}
ckpt = ac.Checkpointer(base / f"root{{rank}}", state)
found = ckpt.restore()
(base / f"restored{{rank}}.{{attempt}}").write_text(str(found.step if found else None))


def stage(step):
    ckpt.save(step - 1).result()  # the writer is up
    # Held until the trainer is gone, or for the second and a half after which its client replaces it.
    os.kill(ckpt.health().writer_pid, signal.SIGSTOP)
    state["w"] = torch.arange(1_000_000, dtype=torch.float32)
    ckpt.save(step).wait_staged()


def meet(other):
    # Opening either end of a FIFO blocks until somebody opens the other.
    with open(base / "fifo", "w" if rank < other else "r"):
        pass


"""


@contextmanager
def torchrun(base: Path, body: str, *, workers: int = 1, restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Run *body* after `WORKER` in every worker; the agent is killed on the way out if it is still there."""
    script = base / "worker.py"
    script.write_text(WORKER.format(base=str(base)) + textwrap.dedent(body))
    os.mkfifo(base / "fifo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    options = [f"--nproc-per-node={workers}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(
        [*command, *options, sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        yield agent
    finally:
        agent.kill()
        agent.wait()


def holders(root: Path) -> list[int]:
    """Processes that hold the run lock of *root* open: its trainer, and every writer of it, replaced or not."""
    lock = str(root / ".asyncckpt" / "run.lock")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(descriptor) == lock for descriptor in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def wait_abandoned(root: Path) -> None:
    """Let the writers that a dead trainer left finish; returns when nobody has anything to do with *root*."""
    while pids := holders(root):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(descriptor, signal.SIGCONT)
                    assert select.select([descriptor], [], [], TIMEOUT_S)[0], f"{pid} still holds {root}"
                finally:
                    os.close(descriptor)


def assert_committed(root: Path, step: int) -> None:
    assert ac.open(root).verify(step).ok
    assert torch.equal(ac.load(root, step)["w"], WEIGHTS)
    assert not list((root / ".asyncckpt" / "partial").iterdir())
    ac.Checkpointer(root, {"w": torch.zeros(1)}, writer=ac.Writer(lock_timeout_s=0)).close()


@pytest.mark.parametrize(
    "death",
    [
        # An exception leaves through the interpreter's exit, which waits for the writer.
        "os.kill(ckpt.health().writer_pid, signal.SIGCONT); raise RuntimeError",
        "os.abort()",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ],
    ids=["exception", "abort", "kill"],
)
def test_a_worker_that_dies_after_staging_has_saved(tmp_path: Path, death: str) -> None:
    with torchrun(tmp_path, f"stage(1)\n{death}") as agent:
        assert agent.wait(TIMEOUT_S) != 0
    wait_abandoned(tmp_path / "root0")
    assert_committed(tmp_path / "root0", 1)


def test_a_worker_torn_down_because_another_died_has_saved(tmp_path: Path) -> None:
    body = """
    stage(1)
    meet(1 - rank)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
    """
    with torchrun(tmp_path, body, workers=2) as agent:
        assert agent.wait(TIMEOUT_S) != 0
    for root in (tmp_path / "root0", tmp_path / "root1"):
        wait_abandoned(root)
        assert_committed(root, 1)


def test_a_job_that_is_told_to_stop_while_it_writes_has_saved(tmp_path: Path) -> None:
    with torchrun(tmp_path, "stage(1)\nmeet(1)\nsignal.pause()") as agent:
        with (tmp_path / "fifo").open():
            agent.send_signal(signal.SIGTERM)
        assert agent.wait(TIMEOUT_S) != 0
    wait_abandoned(tmp_path / "root0")
    assert_committed(tmp_path / "root0", 1)


def test_a_restarted_worker_resumes_from_what_was_staged(tmp_path: Path) -> None:
    body = """
    if attempt == 0:
        stage(7)
        os.kill(ckpt.health().writer_pid, signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGKILL)
    assert torch.equal(state["w"], torch.arange(1_000_000, dtype=torch.float32))
    ckpt.close()
    """
    with torchrun(tmp_path, body, restarts=1) as agent:
        assert agent.wait(TIMEOUT_S) == 0
    assert (tmp_path / "restored0.0").read_text() == "None"
    assert (tmp_path / "restored0.1").read_text() == "7"
    assert_committed(tmp_path / "root0", 7)
