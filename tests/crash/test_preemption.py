"""Whole processes that are told to stop: at random moments, stuck in C, with slow storage, under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from tests.crash.machine import wait_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process and a child subreaper")

HERE = Path(__file__).parent / "preemption"
TIMEOUT_S = 90
NUM_BYTES = 8 * 2**20

PREAMBLE = """
import ctypes, json, logging, os, signal, sys, threading
import torch
import asyncckpt as ac
logging.basicConfig(level=logging.WARNING)
torch.set_num_threads(1)
root = sys.argv[1]
state = {"w": torch.randn(2 * 2**20)}
def tell(event):
    if event.name.startswith("preemption."):
        os.write(1, (event.name + "\\n").encode())
"""


def start(root: Path, body: str, *, bytes_s: float | None = None) -> subprocess.Popen[str]:
    """A trainer that runs *body*; its writer's storage takes *bytes_s*."""
    environment = dict(os.environ)
    if bytes_s is not None:
        path = [str(HERE / "slow_writer"), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(path), "ASYNCCKPT_TEST_BYTES_S": str(bytes_s)}
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.timeout(3600)
def test_signals_at_random_moments_lose_at_most_the_step_under_way(tmp_path: Path, full: bool) -> None:
    # In a sample no limit on speed: the grace period is not what ends it.
    size = ["--signals=200", "--minutes=55"] if full else ["--signals=6", "--no-torchrun", "--grace=90"]
    command = [sys.executable, str(HERE / "run.py"), *size, f"--directory={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout)
    assert summary["violations"] == []
    assert done.returncode == 0
    assert summary["num_signals"] == (200 if full else 6)
    assert summary["num_steps_equal_to_an_uninterrupted_run"] > 0


def test_a_main_thread_stuck_in_c_does_not_delay_the_flush(tmp_path: Path) -> None:
    # read(2) begins anew after each signal, so that the main thread handles none until it is let go.
    body = """
    ckpt = ac.Checkpointer(root, state, on_event=tell)
    signal.siginterrupt(signal.SIGTERM, False)
    saving = ckpt.save(1)
    saving.wait_staged()
    os.write(1, b"stuck\\n")
    ctypes.CDLL(None).read(0, ctypes.create_string_buffer(1), 1)
    os.write(1, b"let go\\n")
    ckpt.step(2)
    ckpt.close()
    """
    with start(tmp_path, body, bytes_s=NUM_BYTES) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdin is not None
        assert trainer.stdout.readline() == "stuck\n"
        trainer.send_signal(signal.SIGTERM)
        assert trainer.stdout.readline() == "preemption.requested\n"
        assert trainer.stdout.readline() == "preemption.flush_planned\n"
        trainer.stdin.write("x")
        trainer.stdin.flush()
        assert "let go\n" in trainer.stdout.read()
        assert trainer.wait(TIMEOUT_S) == 0
    assert [info.step for info in ac.open(tmp_path).checkpoints()] == [1, 2]


def test_with_slow_storage_the_newest_is_there_and_the_log_says_what_is_not(tmp_path: Path) -> None:
    # Each save takes three seconds, as the first one shows, and less than five are left: one of two makes it.
    body = """
    with ac.Checkpointer(root, state, compression="none", preemption=ac.Preemption(grace=5.5)) as ckpt:
        ckpt.save(0).result()
        state["w"].add_(1)
        ckpt.save(1).wait_staged()
        os.kill(os.getpid(), signal.SIGTERM)
        step = 2
        while not ckpt.preempted:
            state["w"].add_(1)  # or its files would be linked
            ckpt.step(step)
            step += 1
        print(step - 1, ckpt.health().writer_pid, flush=True)
    """
    with start(tmp_path, body, bytes_s=NUM_BYTES / 3) as trainer:
        assert trainer.stdout is not None
        newest, writer = map(int, trainer.stdout.readline().split())
        _, log = trainer.communicate(timeout=TIMEOUT_S)
        assert trainer.returncode == 0, log
    assert ac.open(tmp_path).verify(newest).ok
    assert "step 1: not durable in time" in log
    assert "steps [1] are not durable" in log
    # Nobody killed the writer: it finishes the older one, and is gone.
    wait_gone(writer)
    assert [info.step for info in ac.open(tmp_path).checkpoints()] == [0, 1, newest]


@pytest.mark.timeout(300)
def test_ranks_stop_after_the_same_step_although_one_alone_was_told(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
import asyncckpt as ac

base, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
dist.init_process_group("gloo")
state = {"w": torch.zeros(1000)}
options = ac.Preemption(signals=(signal.SIGUSR1,), grace=120.0)
with ac.Checkpointer(base / f"root{rank}", state, preemption=options) as ckpt:
    step = 0
    while not ckpt.preempted:
        step += 1
        state["w"] += 1
        dist.all_reduce(state["w"], op=dist.ReduceOp.MAX)
        if rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        ckpt.step(step)
dist.destroy_process_group()
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    saved = [ac.open(tmp_path / f"root{rank}").checkpoints() for rank in range(2)]
    assert [len(infos) for infos in saved] == [1, 1]
    assert saved[0][0].step == saved[1][0].step >= 5
    assert {infos[0].kind for infos in saved} == {"emergency"}
    for rank in range(2):
        assert torch.equal(ac.load(tmp_path / f"root{rank}")["w"], torch.full((1000,), float(saved[0][0].step)))
