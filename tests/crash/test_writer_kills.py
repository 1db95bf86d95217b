"""A writer that is killed over and over: training notices nothing, and every save becomes durable."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.processes import process_status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process")

TIMEOUT_S = 60
RESTARTS = 5


def signal_writer(ckpt: ac.Checkpointer, number: signal.Signals) -> int:
    """Send a signal to the writer of the moment, once there is one that lives; its pid."""
    deadline = time.monotonic() + TIMEOUT_S
    while (process_status(pid := ckpt.health().writer_pid) or "Z")[0] == "Z":
        assert time.monotonic() < deadline, f"writer {pid} was not replaced"
        time.sleep(0.001)
    os.kill(pid, number)
    return pid


def kill_writer(ckpt: ac.Checkpointer) -> int:
    return signal_writer(ckpt, signal.SIGKILL)


def wait_for_another_writer(ckpt: ac.Checkpointer, than: int) -> None:
    """Block until the client has started a writer in place of *than*."""
    deadline = time.monotonic() + TIMEOUT_S
    while ckpt.health().writer_pid == than:
        assert time.monotonic() < deadline, f"writer {than} was not replaced"
        time.sleep(0.001)


def save(ckpt: ac.Checkpointer, step: int) -> ac.SaveFuture:
    """What the training loop does; the policy says that every step is due."""
    saving = ckpt.step(step)
    assert saving is not None
    return saving


def kill_before(ckpt: ac.Checkpointer, step: int, rng: random.Random) -> tuple[ac.SaveFuture, int]:
    kill_writer(ckpt)
    return save(ckpt, step), 1


def kill_during(ckpt: ac.Checkpointer, step: int, rng: random.Random) -> tuple[ac.SaveFuture, int]:
    saving = save(ckpt, step)
    saving.wait_staged(TIMEOUT_S)
    time.sleep(rng.uniform(0, 0.05))  # any moment of encoding, writing, committing, pruning
    kill_writer(ckpt)
    return saving, 1


def kill_after(ckpt: ac.Checkpointer, step: int, rng: random.Random) -> tuple[ac.SaveFuture, int]:
    saving = save(ckpt, step)
    saving.result(TIMEOUT_S)
    kill_writer(ckpt)
    return saving, 1


def kill_again_and_again(ckpt: ac.Checkpointer, step: int, rng: random.Random) -> tuple[ac.SaveFuture, int]:
    """As often within one save as `Writer.restarts` allows."""
    signal_writer(ckpt, signal.SIGSTOP)  # it must not be done before the kills
    saving = save(ckpt, step)
    num_kills = 0
    while ckpt.health().writer_restarts < RESTARTS and not saving.done():
        killed = kill_writer(ckpt)
        wait_for_another_writer(ckpt, than=killed)
        num_kills += 1
    return saving, num_kills


@pytest.mark.timeout(600)
def test_a_writer_killed_a_hundred_times_costs_training_no_exception(
    tmp_path: Path, full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "asyncckpt")  # one warning for each
    rng = random.Random(0)
    state = {"w": torch.zeros(1_200_000), "small": [torch.zeros(20_000) for _ in range(20)]}
    kills = {kill_before: 0, kill_during: 0, kill_after: 0, kill_again_and_again: 0}
    options = ac.Writer(restarts=RESTARTS)
    with ac.Checkpointer(tmp_path, state, when=ac.Every(steps=1), keep=ac.Keep(last=None), writer=options) as ckpt:
        step = 0
        while sum(kills.values()) < (100 if full else 30):
            step += 1
            for tensor in (state["w"], *state["small"]):
                tensor.fill_(step)
            kill = (
                kill_again_and_again if step == 2 else rng.choice((kill_before, kill_during, kill_during, kill_after))
            )
            saving, count = kill(ckpt, step, rng)
            kills[kill] += count
            assert saving.result(TIMEOUT_S).step == step
            # The save has set the count back; the kill may have come after it was durable.
            assert ckpt.health().writer_restarts <= (0 if kill is kill_before else 1)
        assert ckpt.statistics().num_durable == ckpt.statistics().num_saves == step
        assert min(kills.values()) > 0
        for done in range(1, step + 1):
            assert ckpt.verify(done).ok
            loaded = ckpt.load(done)
            assert all(bool((tensor == done).all()) for tensor in (loaded["w"], *loaded["small"]))
    assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())


def test_the_successor_removes_what_a_killed_writer_left_of_a_streamed_save(tmp_path: Path) -> None:
    # Nobody repeats that save, so nobody else would clean up behind it while training goes on.
    partial = tmp_path / ".asyncckpt" / "partial"
    state = {f"t{index}": torch.rand(100_000) for index in range(20)}
    with ac.Checkpointer(tmp_path, state, staging=ac.Staging(memory_limit=1_000_000)) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        left = partial / "step-00000002-abc" / "state"
        left.mkdir(parents=True)
        (left / "zarr.json").write_bytes(b"x")
        killed = kill_writer(ckpt)
        wait_for_another_writer(ckpt, than=killed)
        ckpt.save(3).result(TIMEOUT_S)
        assert not list(partial.iterdir())
