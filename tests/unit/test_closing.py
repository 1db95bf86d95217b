"""Waiting for what is outstanding: what is said, how it is interrupted. The writer's store waits at a gate."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import trio

import asyncckpt as ac
from asyncckpt.checkpointer import reporting
from asyncckpt.checkpointer.backlog import Backlog, BacklogMeter, PendingSave
from asyncckpt.checkpointer.reporting import LogLines
from asyncckpt.future import SavePromise
from asyncckpt.testing import Gate

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

TIMEOUT_S = 60.0
THREAD = ac.Writer(kind="thread")
LEAVE = "interrupt again"


class Lines(logging.Handler):
    """What is logged, and what is to be done when a line says something."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.reactions: list[tuple[str, Callable[[], object]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.lines.append(line)
        if self.reactions and self.reactions[0][0] in line:
            self.reactions.pop(0)[1]()

    def then(self, text: str, react: Callable[[], object]) -> Lines:
        """Do this once the next line with *text* is logged; one after the other."""
        self.reactions.append((text, react))
        return self


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    monkeypatch.setattr(reporting, "LOG_INTERVAL_S", 0.05)
    handler = Lines()
    logging.getLogger("asyncckpt").addHandler(handler)
    yield handler
    logging.getLogger("asyncckpt").removeHandler(handler)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def open_checkpointer(root: Path) -> ac.Checkpointer:
    return ac.Checkpointer(root, {"w": torch.ones(1_000_000)}, writer=THREAD)


# -- what is said ------------------------------------------------------------------------------


def promise(step: int, raw_bytes: int = 0, progress: float = 0.0) -> SavePromise:
    made = SavePromise(step)
    if raw_bytes:
        made.set_staged(raw_bytes=raw_bytes)
        made.set_progress(progress)
    return made


def test_a_backlog_says_steps_percentages_rate_and_time() -> None:
    promises = [promise(3, 2_000_000, 0.5), promise(4, 1_000_000)]
    now = 100.0
    meter = BacklogMeter(lambda: [one.future for one in promises], lambda: now)
    assert meter.look().describe() == "step 3 (50% of 2.0 MB), step 4 (0% of 1.0 MB)"
    now += 2.0
    promises[0].set_progress(1.0)
    assert meter.look() == Backlog((PendingSave(3, 2_000_000, 2_000_000), PendingSave(4, 1_000_000, 0)), 500_000.0)
    promises[0].set_exception(ac.StorageError("gone"))
    now += 2.0
    promises[1].set_progress(0.6)
    assert meter.look().describe() == "step 4 (60% of 1.0 MB), 400 kB/s, about 1.00 s to go"


def test_a_writer_that_begins_anew_is_measured_anew() -> None:
    promises, now = [promise(3, 1_000_000, 0.9)], 0.0
    meter = BacklogMeter(lambda: [one.future for one in promises], lambda: now)
    meter.look()
    promises[0].set_progress(0.1)
    now = 5.0
    assert meter.look().bytes_s is None
    promises[0].set_progress(0.2)
    now = 6.0
    assert meter.look().bytes_s == 100_000


def test_a_save_that_is_being_staged_has_no_percentage() -> None:
    meter = BacklogMeter(lambda: [promise(3).future])
    assert meter.look().describe() == "step 3 (being staged)"


def test_a_line_is_logged_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    reporter = LogLines(lambda: now)
    for tenths in range(0, 251, 5):
        now = tenths / 10
        reporter.update(Backlog((PendingSave(7, 1000, 450),), None))
    assert [record.getMessage() for record in caplog.records] == [
        "still waiting after 10 s for step 7 (45% of 1.0 kB)",
        "still waiting after 20 s for step 7 (45% of 1.0 kB)",
    ]


def test_wait_and_close_name_what_is_outstanding(tmp_path: Path, commit_gate: Gate) -> None:
    ckpt = open_checkpointer(tmp_path)
    ckpt.save(5).wait_staged(TIMEOUT_S)
    named = r"steps \[5\] are not durable after 0\.\d s: step 5 \(\d+% of 4\.0 MB\)"
    with pytest.raises(TimeoutError, match=named):
        ckpt.wait(timeout=0.05)
    with pytest.raises(TimeoutError, match=named):
        ckpt.close(timeout=0.05)
    with pytest.raises(ac.ClosedError):
        ckpt.save(6)
    commit_gate.open()
    ckpt.close(TIMEOUT_S)
    assert ac.open(tmp_path).verify(5).ok


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_drain_and_aclose_name_what_is_outstanding(tmp_path: Path, commit_gate: Gate, backend: str) -> None:
    async def main() -> None:
        ckpt = open_checkpointer(tmp_path)
        ckpt.save(5).wait_staged(TIMEOUT_S)
        for leave in (ckpt.drain, ckpt.aclose):
            with pytest.raises(TimeoutError, match=r"steps \[5\] are not durable after 0\.\d s"):
                await leave(timeout=0.05)
        commit_gate.open()
        await ckpt.aclose(TIMEOUT_S)

    anyio.run(main, backend=backend)
    assert ac.open(tmp_path).verify(5).ok


def test_leaving_the_block_waits_for_close_timeout_s(tmp_path: Path, commit_gate: Gate) -> None:
    ckpt = open_checkpointer(tmp_path)
    ckpt.close_timeout_s = 0.05
    with pytest.raises(TimeoutError, match=r"steps \[5\]"), ckpt:
        ckpt.save(5)
    commit_gate.open()
    ckpt.close(TIMEOUT_S)


def test_a_timeout_does_not_hide_the_error_that_leaves_the_block(
    tmp_path: Path, commit_gate: Gate, lines: Lines
) -> None:
    ckpt = open_checkpointer(tmp_path)
    ckpt.close_timeout_s = 0.05
    ckpt.save(5)
    with pytest.raises(ZeroDivisionError), ckpt:
        raise ZeroDivisionError
    assert any("left before everything was durable: steps [5]" in line for line in lines.lines)
    commit_gate.open()
    ckpt.close(TIMEOUT_S)


def test_being_told_to_stop_while_closing_bounds_the_wait(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    ckpt = open_checkpointer(tmp_path)
    ckpt.save(5)
    lines.then("still waiting", lambda: ckpt._preempting.request("test", grace_s=0.5))
    with pytest.raises(TimeoutError, match=r"steps \[5\]"):
        ckpt.close()
    commit_gate.open()
    ckpt.close(TIMEOUT_S)


# -- Ctrl-C ------------------------------------------------------------------------------------


def test_one_interrupt_is_kept_until_everything_is_durable(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    lines.then("still waiting", ctrl_c).then(LEAVE, commit_gate.open)
    with pytest.raises(KeyboardInterrupt), open_checkpointer(tmp_path) as ckpt:
        saving = ckpt.save(5)
    assert saving.outcome == "durable"
    assert "waiting for step 5" in "\n".join(lines.lines)
    with pytest.raises(ac.ClosedError):
        ckpt.save(6)
    ac.Checkpointer(tmp_path, {}, writer=THREAD).close()  # the root is free


def test_the_second_interrupt_leaves_at_once(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    lines.then("still waiting", ctrl_c).then(LEAVE, lambda: None).then("still waiting", ctrl_c)
    ckpt = open_checkpointer(tmp_path)
    with pytest.raises(KeyboardInterrupt), ckpt:
        saving = ckpt.save(5)
    assert saving.outcome == "pending"
    commit_gate.open()
    ckpt.close(TIMEOUT_S)
    assert saving.outcome == "durable"


def test_what_leaving_means_depends_on_the_writer(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    lines.then("still waiting", ctrl_c).then(LEAVE, commit_gate.open)
    with pytest.raises(KeyboardInterrupt), open_checkpointer(tmp_path) as ckpt:
        ckpt.save(5)
    assert any(line.endswith("to leave: what is not durable is lost then") for line in lines.lines)


# -- cancellation ------------------------------------------------------------------------------


async def save_and_leave(
    root: Path | ac.Checkpointer, saves: list[ac.SaveFuture], training: Awaitable[object] | None = None
) -> None:
    async with open_checkpointer(root) if isinstance(root, Path) else root as ckpt:
        saves.append(ckpt.save(5))
        if training is not None:
            await training


def test_cancelled_in_training_on_asyncio(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    saves: list[ac.SaveFuture] = []
    lines.then("still waiting", commit_gate.open)

    async def main() -> None:
        task = asyncio.create_task(save_and_leave(tmp_path, saves, asyncio.sleep(TIMEOUT_S)))
        while not saves:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert saves[0].outcome == "durable"


def test_cancelled_in_training_on_trio(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    saves: list[ac.SaveFuture] = []
    lines.then("still waiting", commit_gate.open)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save_and_leave, tmp_path, saves, trio.sleep(TIMEOUT_S))
            while not saves:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert saves[0].outcome == "durable"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_scope_cancelled_while_closing_takes_effect_afterwards(
    tmp_path: Path, commit_gate: Gate, lines: Lines, backend: str
) -> None:
    saves: list[ac.SaveFuture] = []

    async def main() -> None:
        with anyio.CancelScope() as scope:
            cancel = scope.cancel
            if backend == "trio":
                token = trio.lowlevel.current_trio_token()
                lines.then("still waiting", lambda: token.run_sync_soon(cancel))
            else:
                loop = asyncio.get_running_loop()
                lines.then("still waiting", lambda: loop.call_soon_threadsafe(cancel))
            lines.then("still waiting", commit_gate.open)
            await save_and_leave(tmp_path, saves)
            await anyio.sleep(TIMEOUT_S)
        assert scope.cancelled_caught

    anyio.run(main, backend=backend)
    assert saves[0].outcome == "durable"


@pytest.mark.parametrize("times", [1, 2])
def test_a_native_cancellation_while_closing_is_taken_like_ctrl_c(
    tmp_path: Path, commit_gate: Gate, lines: Lines, times: int
) -> None:
    saves: list[ac.SaveFuture] = []
    ckpt = open_checkpointer(tmp_path)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(save_and_leave(ckpt, saves))
        lines.then("still waiting", lambda: loop.call_soon_threadsafe(task.cancel))
        lines.then(LEAVE, (lambda: loop.call_soon(task.cancel)) if times == 2 else commit_gate.open)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert saves[0].outcome == ("durable" if times == 1 else "pending")
    commit_gate.open()
    ckpt.close(TIMEOUT_S)


def test_ctrl_c_while_closing_in_trio(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    saves: list[ac.SaveFuture] = []
    lines.then("still waiting", ctrl_c).then(LEAVE, commit_gate.open)
    with pytest.raises(KeyboardInterrupt):
        trio.run(save_and_leave, tmp_path, saves)
    assert saves[0].outcome == "durable"


def test_ctrl_c_while_closing_in_asyncio(tmp_path: Path, commit_gate: Gate, lines: Lines) -> None:
    saves: list[ac.SaveFuture] = []
    lines.then("still waiting", ctrl_c).then(LEAVE, commit_gate.open)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(save_and_leave(tmp_path, saves))
    assert saves[0].outcome == "durable"


# -- others ------------------------------------------------------------------------------------


def test_a_forked_child_does_not_close(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        pid = os.fork()
        if not pid:
            ckpt.close()
            os._exit(0 if ckpt.health().pending_steps == () else 1)
        assert os.waitpid(pid, 0)[1] == 0
        ckpt.save(2).result(TIMEOUT_S)


def test_a_generator_that_is_forgotten_closes(tmp_path: Path) -> None:
    saves: list[ac.SaveFuture] = []

    def training() -> Iterator[int]:
        with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}, writer=THREAD) as ckpt:
            for step in range(10):
                saves.append(ckpt.save(step))
                yield step

    running: Any = training()
    next(running)
    del running
    assert saves[0].outcome == "durable"


def test_two_threads_may_close(tmp_path: Path, commit_gate: Gate) -> None:
    ckpt = open_checkpointer(tmp_path)
    ckpt.save(5)
    threads = [threading.Thread(target=ckpt.close) for _ in range(2)]
    for thread in threads:
        thread.start()
    commit_gate.open()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert ac.open(tmp_path).verify(5).ok


def test_a_writer_that_dies_when_no_thread_or_process_can_be_started_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As at the end of the interpreter, from Python 3.12 on.
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    ckpt = ac.Checkpointer(tmp_path, {"w": torch.ones(1_000_000)}, writer=ac.Writer(restarts=1))
    ckpt.save(1).result(TIMEOUT_S)
    os.kill(ckpt.health().writer_pid, signal.SIGSTOP)
    saving = ckpt.save(2)
    saving.wait_staged(TIMEOUT_S)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen._execute_child", refuse)
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ac.WriterDiedError, match="interpreter shutdown"):
            saving.result(TIMEOUT_S)
        ckpt.close(TIMEOUT_S)
    ckpt._saves._client._link.wait(TIMEOUT_S)  # no thread could be started to reap it
