"""A checkpointer that is told to stop. The writer is a thread, whose store waits at gates."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt as ac
from asyncckpt.checkpointer import preempting, saves
from asyncckpt.checkpointer.preempting import Preempting
from asyncckpt.preemption.agreement import StopAgreement
from asyncckpt.repository.commit import StepWriter
from asyncckpt.stores import LocalStore, Store
from asyncckpt.testing import Fault, FaultStore, Gate
from asyncckpt.writer import service
from asyncckpt.writer.messages import Hurry
from tests.event_log import EventLog

TIMEOUT_S = 60.0
THREAD = ac.Writer(kind="thread")


def state(megabytes: int = 9) -> dict[str, Any]:
    """More than two chunks, so that a save can be put back in its midst."""
    return {"w": torch.randn(megabytes * 262_144)}


def hold(gate: Gate, step: int, call: str = "write") -> Fault:
    return Fault(call, key=f"*/step-{step:08d}-*", gate=gate)


def save_two_and_hurry(ckpt: ac.Checkpointer, gate: Gate) -> tuple[ac.SaveFuture, ac.SaveFuture]:
    """Step 1 waits at *gate* while it is written, and step 2 is to go first."""
    first = ckpt.save(1)
    assert gate.wait_reached(TIMEOUT_S)
    second = ckpt.save(2)
    second.wait_staged(TIMEOUT_S)
    ckpt._saves.hurry(Hurry([2, 1], compress=True))
    return first, second


# -- the next step -----------------------------------------------------------------------------


def test_the_next_step_is_saved_and_the_training_told_to_end(tmp_path: Path, events: EventLog) -> None:
    called: list[int] = []
    options = ac.Preemption(on_preempted=called.append)
    with ac.Checkpointer(tmp_path, state(), preemption=options, writer=THREAD, on_event=events) as ckpt:
        assert ckpt.step(1) is None
        ckpt.preempt()
        assert not ckpt.preempted
        saving = ckpt.step(2, metrics={"loss": 0.5})
        assert ckpt.preempted
        assert called == [2]
        assert saving is not None
        saving.result(TIMEOUT_S)
        assert ckpt.step(3) is None  # who goes on training is left alone
    (info,) = ac.open(tmp_path).checkpoints()
    assert (info.step, info.kind, info.metrics) == (2, "emergency", {"loss": 0.5})
    assert events.steps("preemption.stopped") == [2]
    assert events.wait("preemption.requested").fields["cause"] == "preempt()"


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_step_that_is_saved_already_is_not_saved_again(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], is_durable: bool
) -> None:
    faulty(*[] if is_durable else [hold(gate, 4)])
    with ac.Checkpointer(tmp_path, state(), writer=THREAD) as ckpt:
        saving = ckpt.save(4)
        if is_durable:
            saving.result(TIMEOUT_S)
        ckpt.preempt()
        assert ckpt.step(4) is None
        assert ckpt.preempted
        gate.open()
    assert [info.kind for info in ac.open(tmp_path).checkpoints()] == ["regular"]


def test_without_a_state_nothing_can_be_saved_but_the_training_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ac.Checkpointer(tmp_path, writer=THREAD) as ckpt:
        ckpt.preempt()
        assert ckpt.step(1) is None
        assert ckpt.preempted
    assert "step 1 is not saved: Checkpointer(state=...) was not given" in caplog.text


def test_a_state_that_cannot_be_saved_raises_and_the_training_ends(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"bad": object()}, writer=THREAD) as ckpt:
        ckpt.preempt()
        with pytest.raises(ac.UnsupportedStateError):
            ckpt.step(1)
        assert ckpt.preempted


def test_an_earlier_failure_does_not_stand_in_the_way(tmp_path: Path, faulty: Callable[..., None]) -> None:
    faulty(Fault("create", key="*/step-00000001-*", error=28))
    ckpt = ac.Checkpointer(tmp_path, state(), writer=THREAD)
    ckpt.save(1)
    with pytest.raises(ac.StorageError):
        ckpt.wait(TIMEOUT_S)
    ckpt.save(1).exception(TIMEOUT_S)
    failed = ckpt._failures
    failed.add(_failed_promise())
    ckpt.preempt()
    saving = ckpt.step(2)
    assert saving is not None
    saving.result(TIMEOUT_S)
    with pytest.raises(ac.StorageError, match="unseen"):
        ckpt.close()


def _failed_promise() -> Any:
    from asyncckpt.future import SavePromise

    promise = SavePromise(0)
    promise.set_exception(ac.StorageError("unseen"))
    return promise


@pytest.mark.parametrize("fails", [ValueError("no"), None])
def test_what_the_callback_raises_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: Exception | None
) -> None:
    def callback(step: int) -> None:
        if fails:
            raise fails

    with ac.Checkpointer(tmp_path, state(1), preemption=ac.Preemption(on_preempted=callback), writer=THREAD) as ckpt:
        ckpt.preempt()
        ckpt.step(1)
    assert ("on_preempted failed" in caplog.text) == (fails is not None)


@pytest.mark.parametrize("when_busy", ["skip", "wait"])
def test_the_last_save_does_not_wait_for_the_one_before(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], when_busy: Any
) -> None:
    # "skip" would drop it, "wait" would block until the disk has taken the other one.
    faulty(hold(gate, 1))
    with ac.Checkpointer(tmp_path, state(), staging=ac.Staging(when_busy=when_busy), writer=THREAD) as ckpt:
        first = ckpt.save(1)
        assert gate.wait_reached(TIMEOUT_S)
        ckpt.preempt(grace=1000)
        last = ckpt.step(2)
        assert last is not None
        last.wait_staged(TIMEOUT_S)
        assert first.outcome == "pending"
        gate.open()
    assert ac.open(tmp_path).verify(2).ok


def test_without_memory_for_both_the_last_save_waits_but_not_for_ever(
    tmp_path: Path,
    gate: Gate,
    faulty: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(saves, "available_memory", lambda: 10 * 2**20)
    faulty(hold(gate, 1))
    with ac.Checkpointer(tmp_path, state(), writer=THREAD) as ckpt:
        ckpt.save(1)
        assert gate.wait_reached(TIMEOUT_S)
        ckpt.preempt(grace=0.2)
        assert ckpt.step(2) is None
        assert ckpt.preempted
        gate.open()
        ckpt.wait(TIMEOUT_S)
    assert "step 2 is not saved: there is no memory" in caplog.text


# -- the flush ---------------------------------------------------------------------------------


def test_staged_saves_are_flushed_at_once_without_a_step(tmp_path: Path, events: EventLog) -> None:
    with ac.Checkpointer(tmp_path, state(), writer=THREAD, on_event=events) as ckpt:
        saving = ckpt.save(1)
        ckpt.preempt(grace=0.5)
        saving.result(TIMEOUT_S)
        assert events.wait("preemption.flushed").fields["lost_steps"] == []
        assert not ckpt.preempted


def test_what_does_not_make_it_is_said(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], events: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    faulty(hold(gate, 1))
    ckpt = ac.Checkpointer(tmp_path, state(), writer=THREAD, on_event=events)
    ckpt.save(1)
    assert gate.wait_reached(TIMEOUT_S)
    ckpt.preempt(grace=0.3)
    ckpt.step(1)
    with pytest.raises(TimeoutError, match=r"steps \[1\]"):
        ckpt.close()
    assert events.wait("preemption.flushed").fields["lost_steps"] == [1]
    assert "steps [1] are not durable" in caplog.text
    planned = events.wait("preemption.flush_planned").fields["saves"]
    assert [(entry["step"], entry["makes_it"]) for entry in planned] == [(1, False)]
    gate.open()
    ckpt.close(TIMEOUT_S)


def test_the_newest_goes_first_and_the_older_one_is_written_after_it(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], events: EventLog
) -> None:
    faulty(hold(gate, 1))
    with ac.Checkpointer(tmp_path, state(), staging=ac.Staging(slots=2), writer=THREAD, on_event=events) as ckpt:
        first, second = save_two_and_hurry(ckpt, gate)
        gate.open()
        first.result(TIMEOUT_S)
        assert second.outcome == "durable"
    assert events.steps("save.durable") == [2, 1]
    assert all(ac.open(tmp_path).verify(step).ok for step in (1, 2))
    assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())


def test_a_save_that_comes_after_the_plan_for_it_goes_first_too(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], events: EventLog
) -> None:
    faulty(hold(gate, 1))
    with ac.Checkpointer(tmp_path, state(), staging=ac.Staging(slots=2), writer=THREAD, on_event=events) as ckpt:
        ckpt.save(1)
        assert gate.wait_reached(TIMEOUT_S)
        ckpt._saves.hurry(Hurry([2, 1], compress=True))
        ckpt.save(2).wait_staged(TIMEOUT_S)
        gate.open()
        ckpt.wait(TIMEOUT_S)
    assert events.steps("save.durable") == [2, 1]


def test_a_save_that_fails_while_it_is_put_back_is_not_written_again_before_the_other(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, events: EventLog
) -> None:
    def open_failing(url: str) -> Store:
        failing = Fault("write", error=errno.EIO, key="*/step-00000001-*")
        return FaultStore(FaultStore(LocalStore(url.removeprefix("file://")), [failing]), [hold(gate, 1)])

    monkeypatch.setattr(service, "open_store", open_failing)
    with ac.Checkpointer(tmp_path, state(), staging=ac.Staging(slots=2), writer=THREAD, on_event=events) as ckpt:
        save_two_and_hurry(ckpt, gate)
        gate.open()
        ckpt.wait(TIMEOUT_S)
    assert events.steps("save.durable") == [2, 1]


def test_a_save_that_was_put_back_is_written_to_a_directory_of_its_own(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    begin = StepWriter.begin

    def record(store: Store, step: int, nonce: str, attempt: int = 0) -> StepWriter:
        begun.append((step, attempt))
        return begin(store, step, nonce, attempt)

    monkeypatch.setattr(StepWriter, "begin", record)
    faulty(hold(gate, 1))
    with ac.Checkpointer(tmp_path, state(), staging=ac.Staging(slots=2), writer=THREAD) as ckpt:
        save_two_and_hurry(ckpt, gate)
        gate.open()
        ckpt.wait(TIMEOUT_S)
    assert begun == [(1, 0), (2, 0), (1, 1)]


def test_a_streamed_save_is_never_put_back(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], events: EventLog
) -> None:
    faulty(hold(gate, 1, "put"))
    streamed = {f"t{index}": torch.randn(100_000) for index in range(20)}
    staging = ac.Staging(slots=2, memory_limit=4_000_000)
    with ac.Checkpointer(tmp_path, streamed, staging=staging, writer=THREAD, on_event=events) as ckpt:
        saving = threading.Thread(target=ckpt.save, args=(1,))
        saving.start()
        assert gate.wait_reached(TIMEOUT_S)
        ckpt._saves.hurry(Hurry([2, 1], compress=True))
        gate.open()
        saving.join()
        ckpt.save(2)
        ckpt.wait(TIMEOUT_S)
    assert events.steps("save.durable") == [1, 2]


def test_compression_is_dropped_in_the_midst_of_a_save(tmp_path: Path, gate: Gate, faulty: Callable[..., None]) -> None:
    faulty(hold(gate, 1))
    zeros = {"w": torch.zeros(8 * 2**20)}  # 8 chunks that compress to nothing
    with ac.Checkpointer(tmp_path, zeros, writer=THREAD) as ckpt:
        saving = ckpt.save(1)
        assert gate.wait_reached(TIMEOUT_S)
        ckpt._saves.hurry(Hurry([1], compress=False))
        gate.open()
        assert 2**20 < saving.result(TIMEOUT_S).stored_bytes < 2**25  # some of either
        zeros["w"].add_(1)
        assert ckpt.save(3).result(TIMEOUT_S).stored_bytes > 2**25
        assert torch.equal(ckpt.load(1)["w"], torch.zeros(8 * 2**20))
        assert ckpt.verify(1, deep=True).ok


# -- leaving -----------------------------------------------------------------------------------


def test_close_does_not_wait_for_what_is_older_than_the_newest(
    tmp_path: Path, faulty: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with Gate() as first, Gate() as again:
        faulty(hold(first, 1), Fault("open_barrier", key="*/step-00000001-*", nth=2, gate=again))
        ckpt = ac.Checkpointer(tmp_path, state(), staging=ac.Staging(slots=2), writer=THREAD)
        older, newest = save_two_and_hurry(ckpt, first)
        first.open()
        newest.result(TIMEOUT_S)
        assert again.wait_reached(TIMEOUT_S)
        ckpt.preempt(grace=0.2)
        ckpt.close()
        assert older.outcome == "pending"
        again.open()
        older.result(TIMEOUT_S)
    assert "steps [1] are not durable" in caplog.text


def test_a_process_that_outlives_its_time_waits_as_if_nothing_had_happened(
    tmp_path: Path, gate: Gate, faulty: Callable[..., None], events: EventLog
) -> None:
    faulty(hold(gate, 1))
    ckpt = ac.Checkpointer(tmp_path, state(), writer=THREAD, preemption=ac.Preemption(signals=()), on_event=events)
    ckpt.preempt(grace=1e-3)
    events.wait("preemption.flushed")
    ckpt.save(1)
    closing = threading.Thread(target=ckpt.close)
    closing.start()
    assert gate.wait_reached(TIMEOUT_S)
    gate.open()
    closing.join(TIMEOUT_S)
    assert ac.open(tmp_path).verify(1).ok


# -- signals -----------------------------------------------------------------------------------


def test_sigterm_stops_the_training_and_close_puts_the_old_handler_back(tmp_path: Path, events: EventLog) -> None:
    calls: list[int] = []

    def users(signum: int, frame: object) -> None:
        calls.append(signum)

    before = signal.signal(signal.SIGTERM, users)
    try:
        with ac.Checkpointer(tmp_path, state(), writer=THREAD, on_event=events) as ckpt:
            signal.raise_signal(signal.SIGTERM)
            events.wait("preemption.requested")
            ckpt.step(7)
            assert ckpt.preempted
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is users
        signal.raise_signal(signal.SIGTERM)
        assert len(calls) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ac.open(tmp_path).checkpoints()[0].step == 7


def test_none_watches_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ac.Checkpointer(tmp_path, state(1), preemption=None, writer=THREAD) as ckpt:
        assert signal.getsignal(signal.SIGTERM) is before
        threading.Thread(target=ckpt.preempt).start()
        while not ckpt.preempted:
            ckpt.step(ckpt._preempting.last_step + 1)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_asynchronous_close_puts_the_handler_back(tmp_path: Path, backend: str) -> None:
    before = signal.getsignal(signal.SIGTERM)

    async def main() -> None:
        async with ac.Checkpointer(tmp_path, state(1), writer=THREAD) as ckpt:
            assert signal.getsignal(signal.SIGTERM) is not before
            signal.raise_signal(signal.SIGTERM)
            while not ckpt.preempted:
                ckpt.step(ckpt._preempting.last_step + 1)
        assert signal.getsignal(signal.SIGTERM) is before

    if backend == "trio":
        pytest.importorskip("trio").run(main)
    else:
        asyncio.run(main())


# -- ranks -------------------------------------------------------------------------------------


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> StopAgreement:
    """The other one of two ranks; the checkpointer in the test is rank 0."""
    import torch.distributed as dist

    store = dist.HashStore()
    monkeypatch.setattr(preempting, "agreement_of_group", lambda: StopAgreement(store, 0, 2))
    other = StopAgreement(store, 1, 2)
    other.join()
    return other


def test_a_rank_goes_on_to_the_step_that_another_has_begun(tmp_path: Path, rank: StopAgreement) -> None:
    with ac.Checkpointer(tmp_path, state(1), preemption=None, writer=THREAD) as ckpt:
        ckpt.step(4)
        ckpt.preempt(grace=1000)
        rank.say(5)
        assert ckpt.step(5) is None  # waits for what the other says
        assert not ckpt.preempted
        ckpt.step(6)
        assert ckpt.preempted


def test_a_rank_hears_that_another_was_told_to_stop(tmp_path: Path, rank: StopAgreement, events: EventLog) -> None:
    with ac.Checkpointer(tmp_path, state(1), preemption=None, writer=THREAD, on_event=events) as ckpt:
        ckpt.step(4)
        rank.say(3)
        assert events.wait("preemption.requested").fields["cause"] == "another rank"
        ckpt.step(5)  # has passed it if that came before this rank's answer; then all stop one later
        if not ckpt.preempted:
            ckpt.step(6)
        assert ckpt.preempted


def test_a_rank_that_says_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, rank: StopAgreement, caplog: pytest.LogCaptureFixture
) -> None:
    with ac.Checkpointer(tmp_path, state(1), preemption=None, writer=THREAD) as ckpt:
        ckpt.preempt(grace=0.2)
        ckpt.step(1)
        assert ckpt.preempted
    assert "stopping after step 1 without them" in caplog.text


def test_a_store_that_is_gone_leaves_each_rank_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone:
        def set(self, *arguments: object) -> None:
            raise ConnectionError("gone")

        get = check = set

    caplog.set_level(logging.DEBUG, "asyncckpt")
    monkeypatch.setattr(preempting, "agreement_of_group", lambda: StopAgreement(Gone(), 0, 2))  # type: ignore[arg-type]
    with ac.Checkpointer(tmp_path, state(1), writer=THREAD) as ckpt:
        ckpt.preempt(grace=1000)
        ckpt.step(1)
        assert ckpt.preempted
    assert "gone" in caplog.text


def test_repr_says_what_it_is_doing(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, state(1), writer=THREAD) as ckpt:
        assert isinstance(ckpt._preempting, Preempting)
        assert "watching" in repr(ckpt._preempting)
        ckpt.preempt()
        assert "requested" in repr(ckpt._preempting)
        ckpt.step(1)
        assert "preempted" in repr(ckpt._preempting)
