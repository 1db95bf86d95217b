"""Every way out of a training process, with real interpreters. The writer's commit waits for a file to appear."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import asyncckpt as ac
from tests.crash.machine import wait_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a writer process")

TIMEOUT_S = 90
WAITING, LEAVE = "still waiting", "interrupt again"

# Imported by every interpreter on this path, the writer's too.
_HOLD_COMMITS = """
import os, sys, time
if "asyncckpt.writer" in sys.orig_argv:
    from asyncckpt.stores.local import LocalStore
    rename = LocalStore.rename

    def rename_when_allowed(self, *arguments):
        while not os.path.exists({gate!r}):
            time.sleep(0.01)
        rename(self, *arguments)

    LocalStore.rename = rename_when_allowed
"""

_PROLOGUE = """
import atexit, os, sys
import torch
import asyncckpt as ac
from asyncckpt.checkpointer import reporting

reporting.LOG_INTERVAL_S = 0.1
ckpt = ac.Checkpointer({root!r}, {{"w": torch.ones(1000)}}, preemption=None)

def save():
    ckpt.save(1).wait_staged()
    print("writer", ckpt.health().writer_pid, flush=True)
"""


class Training:
    """A training process whose save cannot be committed before `allow`."""

    def __init__(self, folder: Path, body: str) -> None:
        self.root, self._gate, self._output = folder / "run", folder / "gate", folder / "output"
        hook = folder / "hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(_HOLD_COMMITS.format(gate=str(self._gate)))
        path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Not a pipe, which would stay open as long as the writer lives.
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROLOGUE.format(root=str(self.root)) + textwrap.dedent(body)],
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def read_until(self, text: str) -> str:
        """The first line with *text*."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.output.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line
            time.sleep(0.01)
        raise AssertionError(f"{text!r} was not said:\n{self.output}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def allow(self) -> None:
        """Let the writer commit."""
        self._gate.touch()

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(TIMEOUT_S)

    def is_durable(self) -> bool:
        return (self.root / "step-00000001" / "zarr.json").exists()

    def close(self) -> None:
        """Leave no process behind, whatever went wrong."""
        self.allow()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Training]]:
    with contextlib.ExitStack() as stack:
        yield lambda body: stack.enter_context(contextlib.closing(Training(tmp_path, body)))


LEAVES_WAITING = {
    "sys.exit in the block": ("with ckpt:\n    save()\n    sys.exit(3)", 3),
    "an exception in the block": ("with ckpt:\n    save()\n    raise ValueError", 1),
    "without a block": ("save()", 0),
    "an exception without a block": ("save()\nraise ValueError", 1),
    "a generator": (
        "def train():\n    with ckpt:\n        save()\n        yield\n\nrunning = train()\nnext(running)\nsys.exit(4)",
        4,
    ),
}


@pytest.mark.parametrize("way", LEAVES_WAITING)
def test_these_wait_until_everything_is_durable(start: Callable[[str], Training], way: str) -> None:
    body, code = LEAVES_WAITING[way]
    training = start(body)
    training.read_until(WAITING)
    assert not training.is_durable()
    training.allow()
    assert training.end() == code, training.output
    assert training.is_durable()
    assert "Exception ignored" not in training.output
    assert ac.open(training.root).verify(1).ok


BLOCK = "with ckpt:\n    save()\n"
NO_BLOCK = "save()\n"
TRAINING = 'with ckpt:\n    save()\n    print("training", flush=True)\n    while True: pass\n'


@pytest.mark.parametrize("body", [BLOCK, NO_BLOCK, TRAINING], ids=["block", "no block", "interrupted training"])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_waiting(start: Callable[[str], Training], body: str, times: int) -> None:
    training = start(body)
    writer = int(training.read_until("writer").split()[1])
    if body is TRAINING:
        training.read_until("training")
        training.interrupt()
    training.read_until(WAITING)
    training.interrupt()
    assert "the writer goes on by itself" in training.read_until(LEAVE)
    if times == 2:
        training.interrupt()
        code = training.end()
        assert not training.is_durable()
    if times == 1:
        with pytest.raises(subprocess.TimeoutExpired):
            training.process.wait(0.5)
    training.allow()
    if times == 1:
        code = training.end()
        assert training.is_durable()
    # At the end of the interpreter nothing is left to interrupt.
    assert code == (0 if body is NO_BLOCK else -signal.SIGINT), training.output
    wait_gone(writer)
    assert ac.open(training.root).verify(1).ok


def test_os_exit_leaves_at_once_and_the_writer_commits(start: Callable[[str], Training]) -> None:
    training = start("save()\nos._exit(5)")
    writer = int(training.read_until("writer").split()[1])
    assert training.end() == 5
    assert not training.is_durable()
    training.allow()
    wait_gone(writer)
    assert ac.open(training.root).verify(1).ok


def test_a_time_limit_at_the_end_of_the_interpreter_is_logged(start: Callable[[str], Training]) -> None:
    training = start("ckpt.close_timeout_s = 0.2\nsave()")
    assert training.end() == 0
    assert "left before everything was durable: steps [1] are not durable after 0.2 s" in training.output
    assert not training.is_durable()


def test_exit_functions_of_others_still_run_after_a_second_ctrl_c(start: Callable[[str], Training]) -> None:
    # Registered before ours, so they run after it.
    training = start(
        """
        atexit.unregister(ckpt._ending.at_exit)
        atexit.register(print, "bye", flush=True)
        atexit.register(ckpt._ending.at_exit)
        save()
        """
    )
    training.read_until(WAITING)
    training.interrupt()
    training.read_until(LEAVE)
    training.interrupt()
    assert training.end() == 0
    assert training.output.endswith("bye\n")


def test_a_notebook_kernel_that_is_shut_down_waits(tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        client.execute_interactive(
            "import torch, asyncckpt as ac; ckpt = ac.Checkpointer('run', {'w': torch.ones(10)}); ckpt.save(1)",
            timeout=TIMEOUT_S,
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=False)
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "run" / "step-00000001").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ac.open(tmp_path / "run").verify(1).ok
