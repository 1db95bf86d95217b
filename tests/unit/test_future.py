"""`SaveFuture` and `SavePromise` from threads."""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from datetime import UTC, datetime

import pytest

from asyncckpt.errors import SaveCancelledError, SaveSkippedError, SaveSupersededError, StorageError
from asyncckpt.future import SaveFuture, SavePromise
from asyncckpt.model import CheckpointInfo, SaveStats

INFO = CheckpointInfo(
    step=7,
    path="/root/step-00000007",
    kind="regular",
    created=datetime(2025, 1, 1, tzinfo=UTC),
    raw_bytes=10,
    stored_bytes=5,
    num_arrays=1,
    world_size=1,
    format=1,
    nonce="n",
)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_new_future_is_pending() -> None:
    future = SavePromise(7).future
    assert (future.step, future.outcome, future.staged, future.progress) == (7, "pending", False, 0.0)
    assert not future.done()
    assert not future.cancelled()
    assert future.stats == SaveStats()


def test_result_waits_for_another_thread() -> None:
    promise = SavePromise(7)
    thread = in_thread(lambda: promise.set_result(INFO))
    assert promise.future.result(timeout=10) is INFO
    assert promise.future.exception() is None
    assert promise.future.outcome == "durable"
    thread.join()


def test_durable_implies_staged_and_complete() -> None:
    promise = SavePromise(7)
    promise.set_result(INFO)
    promise.future.wait_staged(timeout=0)
    assert promise.future.staged
    assert promise.future.progress == 1.0


def test_failure_keeps_its_type_and_identity() -> None:
    promise = SavePromise(7)
    error = StorageError("disk full", errno=28)
    promise.set_exception(error)
    with pytest.raises(StorageError) as caught:
        promise.future.result()
    assert caught.value is error
    assert promise.future.exception() is error
    assert promise.future.outcome == "failed"


def test_foreign_failure_keeps_its_type() -> None:
    promise = SavePromise(7)
    promise.set_exception(ZeroDivisionError("x"))
    with pytest.raises(ZeroDivisionError):
        promise.future.result()


def test_raising_often_does_not_grow_the_traceback() -> None:
    promise = SavePromise(7)
    promise.set_exception(StorageError("disk full"))
    depths = []
    for _ in range(3):
        with pytest.raises(StorageError) as caught:
            promise.future.result()
        depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(set(depths)) == 1


@pytest.mark.parametrize("method", ["result", "exception", "wait_staged"])
def test_timeouts_name_the_step_and_leave_the_save_alone(method: str) -> None:
    future = SavePromise(7).future
    with pytest.raises(TimeoutError, match="step 7"):
        getattr(future, method)(timeout=0)
    assert not future.done()


def test_wait_staged_returns_while_the_save_goes_on() -> None:
    promise = SavePromise(7)
    thread = in_thread(promise.set_staged)
    promise.future.wait_staged(timeout=10)
    assert promise.future.staged
    assert not promise.future.done()
    thread.join()


def test_wait_staged_returns_when_the_save_fails_after_staging() -> None:
    promise = SavePromise(7)
    promise.set_staged()
    promise.set_exception(StorageError("disk full"))
    promise.future.wait_staged(timeout=0)


def test_wait_staged_raises_what_kept_the_snapshot_from_being_taken() -> None:
    promise = SavePromise(7)
    promise.set_exception(MemoryError())
    promise.set_staged()  # too late: the failed save stays unstaged
    with pytest.raises(MemoryError):
        promise.future.wait_staged(timeout=0)
    assert not promise.future.staged


def test_wait_staged_wakes_up_when_the_save_fails_first() -> None:
    promise = SavePromise(7)
    thread = in_thread(lambda: promise.set_exception(MemoryError()))
    with pytest.raises(MemoryError):
        promise.future.wait_staged(timeout=10)
    thread.join()


@pytest.mark.parametrize(("outcome", "error"), [("skipped", SaveSkippedError), ("superseded", SaveSupersededError)])
def test_saves_given_up_by_design_raise_their_own_type(outcome: str, error: type[Exception]) -> None:
    promise = SavePromise(7)
    assert promise.set_outcome(outcome, "no slot is free")  # type: ignore[arg-type]
    assert promise.future.outcome == outcome
    with pytest.raises(error, match="no slot is free") as caught:
        promise.future.result()
    assert caught.value.fields == {"step": 7}  # type: ignore[attr-defined]
    assert not promise.future.cancelled()


def test_cancel_before_the_claim() -> None:
    promise = SavePromise(7)
    assert promise.future.cancel()
    assert promise.future.cancelled()
    assert promise.future.cancel()  # again: still cancelled
    assert not promise.claim()
    assert not promise.set_result(INFO)
    with pytest.raises(SaveCancelledError) as caught:
        promise.future.result()
    assert isinstance(caught.value, CancelledError)


def test_cancel_after_the_claim_is_too_late() -> None:
    promise = SavePromise(7)
    assert promise.claim()
    assert promise.claim()  # a restarted writer gets the same save again
    assert not promise.future.cancel()
    assert promise.set_result(INFO)
    assert promise.future.result() is INFO


def test_cancel_of_a_settled_save_is_false() -> None:
    promise = SavePromise(7)
    promise.set_outcome("skipped", "busy")
    assert not promise.future.cancel()


def test_either_cancel_or_claim_wins() -> None:
    for _ in range(100):
        promise = SavePromise(7)
        barrier = threading.Barrier(2)
        won: list[str] = []

        def claim(promise: SavePromise = promise, barrier: threading.Barrier = barrier, won: list[str] = won) -> None:
            barrier.wait()
            if promise.claim():
                won.append("claim")

        thread = in_thread(claim)
        barrier.wait()
        if promise.future.cancel():
            won.append("cancel")
        thread.join()
        assert len(won) == 1


def test_the_first_to_settle_wins() -> None:
    promise = SavePromise(7)
    assert promise.set_exception(StorageError("disk full"))
    assert not promise.set_result(INFO)
    assert not promise.set_exception(ValueError())
    assert not promise.set_outcome("skipped", "busy")
    assert promise.future.outcome == "failed"
    assert isinstance(promise.future.exception(), StorageError)


def test_all_waiters_wake_up() -> None:
    promise = SavePromise(7)
    results: list[CheckpointInfo] = []
    threads = [in_thread(lambda: results.append(promise.future.result(timeout=10))) for _ in range(4)]
    promise.set_result(INFO)
    for thread in threads:
        thread.join()
    assert results == [INFO] * 4


def test_callbacks_run_in_order_with_the_settled_future() -> None:
    promise = SavePromise(7)
    calls: list[tuple[int, SaveFuture, str]] = []
    for number in range(3):
        promise.future.add_done_callback(lambda future, number=number: calls.append((number, future, future.outcome)))  # type: ignore[misc]
    assert calls == []
    promise.set_result(INFO)
    assert calls == [(number, promise.future, "durable") for number in range(3)]


def test_callback_on_a_settled_future_runs_at_once() -> None:
    promise = SavePromise(7)
    promise.future.cancel()
    calls: list[SaveFuture] = []
    promise.future.add_done_callback(calls.append)
    assert calls == [promise.future]


def test_callbacks_may_use_the_future() -> None:
    promise = SavePromise(7)
    results: list[CheckpointInfo] = []
    promise.future.add_done_callback(
        lambda future: future.add_done_callback(lambda same: results.append(same.result()))
    )
    promise.set_result(INFO)
    assert results == [INFO]


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(1)])
def test_failing_callbacks_are_logged_and_the_others_run(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    promise = SavePromise(7)
    calls: list[SaveFuture] = []

    def fail(future: SaveFuture) -> None:
        raise error

    promise.future.add_done_callback(fail)
    promise.future.add_done_callback(calls.append)
    with caplog.at_level(logging.ERROR, logger="asyncckpt"):
        promise.set_result(INFO)
    assert calls == [promise.future]
    (record,) = caplog.records
    assert "step=7" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_keyboard_interrupt_in_a_callback_reaches_the_main_thread() -> None:
    promise = SavePromise(7)
    promise.set_result(INFO)

    def interrupt(future: SaveFuture) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        promise.future.add_done_callback(interrupt)


def test_progress_is_clamped_and_frozen_once_settled() -> None:
    promise = SavePromise(7)
    for given, seen in [(-1.0, 0.0), (0.25, 0.25), (3.0, 1.0), (0.5, 0.5)]:
        promise.set_progress(given)
        assert promise.future.progress == seen
    promise.set_exception(StorageError("disk full"))
    promise.set_progress(0.9)
    assert promise.future.progress == 0.5


def test_stats_accumulate() -> None:
    promise = SavePromise(7)
    promise.update_stats(stage_s=0.5, raw_bytes=100)
    promise.set_result(INFO)
    promise.update_stats(blocked_s=0.25)
    assert promise.future.stats == SaveStats(blocked_s=0.25, stage_s=0.5, raw_bytes=100)


def test_set_result_may_replace_the_stats() -> None:
    promise = SavePromise(7)
    promise.update_stats(stage_s=0.5)
    promise.set_result(INFO, SaveStats(durable_s=2.0))
    assert promise.future.stats == SaveStats(durable_s=2.0)


def test_unseen_error_is_taken_once() -> None:
    promise = SavePromise(7)
    error = StorageError("disk full")
    assert promise.take_unseen_error() is None
    promise.set_exception(error)
    assert promise.take_unseen_error() is error
    assert promise.take_unseen_error() is None


@pytest.mark.parametrize("method", ["result", "exception", "wait_staged"])
def test_looked_at_errors_are_not_unseen(method: str) -> None:
    promise = SavePromise(7)
    promise.set_exception(StorageError("disk full"))
    with contextlib.suppress(StorageError):
        getattr(promise.future, method)()
    assert promise.take_unseen_error() is None


def test_a_callback_alone_has_not_looked() -> None:
    promise = SavePromise(7)
    promise.future.add_done_callback(lambda future: future.outcome)
    promise.set_exception(StorageError("disk full"))
    assert isinstance(promise.take_unseen_error(), StorageError)


def test_saves_given_up_are_no_unseen_errors() -> None:
    skipped, cancelled = SavePromise(7), SavePromise(8)
    skipped.set_outcome("skipped", "busy")
    cancelled.future.cancel()
    assert skipped.take_unseen_error() is None
    assert cancelled.take_unseen_error() is None


def test_repr_tells_the_state() -> None:
    promise = SavePromise(7)
    assert repr(promise.future) == "<SaveFuture step=7 pending staging 0%>"
    promise.set_staged()
    promise.set_progress(0.425)
    assert repr(promise.future) == "<SaveFuture step=7 pending staged 42%>"
    promise.set_result(INFO, SaveStats(durable_s=1.234))
    assert repr(promise) == "<SavePromise of <SaveFuture step=7 durable in 1.23 s>>"


def test_repr_of_failures() -> None:
    failed, cancelled = SavePromise(7), SavePromise(8)
    failed.set_exception(StorageError("disk full", errno=28))
    cancelled.future.cancel()
    assert repr(failed.future) == "<SaveFuture step=7 failed StorageError('disk full', errno=28)>"
    assert repr(cancelled.future) == "<SaveFuture step=8 cancelled>"
