"""DataLoader workers and signals to the whole process group, with real workers in a session of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import asyncckpt as ac
from asyncckpt.preemption.workers import is_worker_death
from tests.crash.machine import wait_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process")

TIMEOUT_S = 90

_TRAIN = """
import signal, sys
import torch
from torch.utils.data import DataLoader, Dataset
import asyncckpt as ac

root, context, persistent, mode = sys.argv[1], sys.argv[2], sys.argv[3] == "True", sys.argv[4]

class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if mode in ("unshielded", "exits") and index == 6:
            signal.pause()  # the trainer waits for it
        return torch.ones(4)

def main():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(
        Numbers(), batch_size=2, num_workers=2, multiprocessing_context=context, persistent_workers=persistent
    )
    if mode != "unshielded":
        ac.shield_workers(loader)
    step = -1
    with ac.Checkpointer(root, {"model": model, "optimizer": optimizer}) as ckpt:
        while not ckpt.preempted:
            batches = iter(loader)
            workers = [worker.pid for worker in batches._workers]
            for batch in batches:
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
                step += 1
                torch.save(model.weight.detach(), sys.argv[5] + f"-{step}")
                ckpt.step(step)
                print("step", step, *workers, flush=True)
                if ckpt.preempted:
                    break
                if mode == "exits" and step == 2:
                    global alive
                    alive = batches
                    sys.exit(4)

if __name__ == "__main__":
    main()
"""


class Training:
    def __init__(self, folder: Path, context: str, persistent: bool, mode: str) -> None:
        self.root, self.weights, self._output = folder / "run", folder / "weights", folder / "output"
        (folder / "train.py").write_text(_TRAIN)
        arguments = [str(self.root), context, str(persistent), mode, str(self.weights)]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(folder / "train.py"), *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def workers_at(self, step: int) -> list[int]:
        """Wait until *step* is complete."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.output.splitlines(keepends=True):
                if line.startswith(f"step {step} ") and line.endswith("\n"):
                    return [int(word) for word in line.split()[2:]]
            time.sleep(0.01)
        raise AssertionError(self.output)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def training(folder: Path, context: str, persistent: bool, mode: str) -> Iterator[Training]:
    with contextlib.closing(Training(folder, context, persistent, mode)) as started:
        yield started


@pytest.mark.parametrize(("context", "persistent"), [("fork", False), ("fork", True), ("spawn", True)])
def test_shielded_workers_outlive_a_signal_to_the_group(tmp_path: Path, context: str, persistent: bool) -> None:
    # With workers that are not kept, a signal may come before new ones are shielded: this one is sent within a pass.
    with training(tmp_path, context, persistent, "shielded") as trained:
        workers = trained.workers_at(0)
        os.killpg(trained.process.pid, signal.SIGTERM)
        assert trained.process.wait(TIMEOUT_S) == 0, trained.output
        assert "DataLoader worker" not in trained.output
        latest = ac.open(trained.root).latest
        assert latest is not None
        assert latest.kind == "emergency"
        for worker in workers:
            wait_gone(worker)


def test_when_a_worker_dies_first_the_last_completed_step_is_saved(tmp_path: Path) -> None:
    with training(tmp_path, "fork", False, "unshielded") as trained:
        trained.workers_at(2)  # the next batch never comes
        os.killpg(trained.process.pid, signal.SIGTERM)
        assert trained.process.wait(TIMEOUT_S) == 1, trained.output
        assert "is killed by signal: Terminated" in trained.output
        latest = ac.open(trained.root).latest
        assert latest is not None
        assert (latest.step, latest.kind) == (2, "emergency")
        saved = ac.load(trained.root, 2)["model"]["weight"]
        assert torch.equal(saved, torch.load(f"{trained.weights}-2"))


def test_a_trainer_whose_shielded_worker_is_busy_can_exit(tmp_path: Path) -> None:
    with training(tmp_path, "fork", False, "exits") as trained:
        assert trained.process.wait(TIMEOUT_S) == 4, trained.output
        assert "Traceback" not in trained.output


def test_shielded_workers_end_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    with training(tmp_path, "fork", True, "shielded") as trained:
        workers = trained.workers_at(0)
        trained.process.kill()
        for worker in workers:
            wait_gone(worker)


# -- which state is saved ----------------------------------------------------------------------

DEATH = "DataLoader worker (pid 5) is killed by signal: Terminated. "


class Loop:
    def __init__(self, root: Path) -> None:
        model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        self.state = {"model": model, "optimizer": self.optimizer}
        self.ckpt = ac.Checkpointer(root, self.state, writer=ac.Writer(kind="thread"))

    def train(self) -> None:
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()


@pytest.mark.parametrize(
    ("error", "is_told", "is_saved"),
    [
        (RuntimeError(DEATH), False, True),
        (RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly"), False, True),
        (RuntimeError("NaN"), False, False),
        (RuntimeError("NaN"), True, True),
        (SystemExit(1), True, True),
    ],
)
def test_what_has_to_leave_the_block(tmp_path: Path, error: BaseException, is_told: bool, is_saved: bool) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(type(error)), loop.ckpt as ckpt:  # noqa: PT012
        loop.train()
        ckpt.step(1)
        if is_told:
            ckpt.preempt()
        raise error
    assert [(info.step, info.kind) for info in ac.open(tmp_path).checkpoints()] == (
        [(1, "emergency")] if is_saved else []
    )


def test_a_state_that_an_optimizer_has_touched_is_not_saved(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(RuntimeError, match="killed by signal"), loop.ckpt as ckpt:  # noqa: PT012
        loop.train()
        ckpt.step(1)
        loop.train()  # between here and step(2)
        raise RuntimeError(DEATH)
    assert ac.open(tmp_path).latest is None


def test_a_state_without_an_optimizer_is_not_saved(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(RuntimeError, match="killed by signal"), loop.ckpt as ckpt:  # noqa: PT012
        ckpt.step(1)
        raise RuntimeError(DEATH)
    assert ac.open(tmp_path).latest is None


def test_a_save_that_fails_does_not_hide_what_happened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(RuntimeError, match="killed by signal"), loop.ckpt as ckpt:  # noqa: PT012
        loop.train()
        ckpt.step(1)
        loop.state["bad"] = object()  # type: ignore[assignment]
        raise RuntimeError(DEATH)
    assert "step 1 is not saved" in caplog.text


def test_deaths_are_recognised_through_their_consequences() -> None:
    consequence = ValueError("the loop of a framework failed")
    consequence.__context__ = RuntimeError(DEATH)
    assert is_worker_death(consequence)
    assert not is_worker_death(ValueError(DEATH))
    assert not is_worker_death(None)


# -- the helpers -------------------------------------------------------------------------------


def test_shielding_keeps_the_users_worker_init_fn() -> None:
    called: list[int] = []
    loader = DataLoader([1, 2], num_workers=0, worker_init_fn=called.append)
    assert ac.shield_workers(ac.shield_workers(loader)) is loader
    handlers = {name: signal.getsignal(name) for name in (2, 15, 1, 10, 12)}
    try:
        assert loader.worker_init_fn is not None
        loader.worker_init_fn(3)
        assert called == [3]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    plain = ac.shield_workers(DataLoader([1, 2]))
    assert plain.worker_init_fn is ac.shield_worker


def test_running_workers_cannot_be_shielded() -> None:
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    batches = iter(loader)
    with pytest.raises(ac.InvalidOptionError, match="running"):
        ac.shield_workers(loader)
    batches._shutdown_workers()  # type: ignore[attr-defined]


class _Recording(DataLoader[int]):
    """Notes which signals are blocked while it starts its workers, and has them tell what they do about SIGTERM."""

    blocked: set[signal.Signals]

    def _get_iterator(self) -> Any:
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return super()._get_iterator()


class _WhatOfSigterm(Dataset[tuple[bool, bool]]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[bool, bool]:
        return signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, signal.SIGTERM in signal.pthread_sigmask(0, [])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_signal_before_a_worker_is_initialised_waits_for_it(context: str) -> None:
    loader = ac.shield_workers(
        _Recording(_WhatOfSigterm(), batch_size=None, num_workers=1, multiprocessing_context=context)
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert [tuple(told) for told in loader] == [(True, False)]
    assert signal.SIGTERM in loader.blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
