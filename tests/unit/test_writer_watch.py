"""When a writer counts as stopped, silent or stalled, and which errors are worth another attempt."""

from __future__ import annotations

import errno

import pytest

from asyncckpt.errors import CorruptError, StorageError
from asyncckpt.writer.retry import RETRY_DELAYS_S, retry_delay
from asyncckpt.writer.watch import CHECK_INTERVAL_S, WriterWatch

BUSY = {"is_stopped": False, "is_busy": True}


def checks_until_symptom(watch: WriterWatch, *, is_stopped: bool, is_busy: bool) -> tuple[int, str | None]:
    for number in range(1, 10_000):
        symptom = watch.check(is_stopped=is_stopped, is_busy=is_busy)
        if symptom is not None:
            return number, symptom
    return 0, None


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_stopped_writer_is_noticed_within_two_seconds_busy_or_not(is_busy: bool) -> None:
    number, symptom = checks_until_symptom(WriterWatch(None), is_stopped=True, is_busy=is_busy)
    assert symptom == "stopped"
    assert number * CHECK_INTERVAL_S <= 2.0


def test_a_writer_that_goes_on_in_between_was_not_stopped() -> None:
    watch = WriterWatch(None)
    for _ in range(100):
        assert watch.check(is_stopped=True, is_busy=False) is None
        assert watch.check(is_stopped=False, is_busy=False) is None


def test_a_busy_writer_without_a_sign_of_life_is_silent_after_half_a_minute() -> None:
    number, symptom = checks_until_symptom(WriterWatch(None), **BUSY)
    assert symptom == "silent"
    assert number * CHECK_INTERVAL_S == 30.0


def test_an_idle_writer_may_be_silent_for_ever() -> None:
    assert checks_until_symptom(WriterWatch(1.0), is_stopped=False, is_busy=False) == (0, None)


def test_a_writer_that_lives_but_gets_nothing_written_is_stalled() -> None:
    watch = WriterWatch(20.0)
    for _ in range(39):
        watch.heard(is_progress=False)
        assert watch.check(**BUSY) is None
    watch.heard(is_progress=False)
    assert watch.check(**BUSY) == "stalled"


def test_progress_starts_the_count_anew() -> None:
    watch = WriterWatch(20.0)
    for _ in range(1000):
        watch.heard(is_progress=True)
        assert [watch.check(**BUSY) for _ in range(39)] == [None] * 39


@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM])
def test_transient_errors_are_tried_again_ever_later(code: int) -> None:
    error = StorageError("no", errno=code)
    delays = [retry_delay(error, attempt) for attempt in range(len(RETRY_DELAYS_S) + 1)]
    assert delays == [*RETRY_DELAYS_S, None]
    assert list(RETRY_DELAYS_S) == sorted(RETRY_DELAYS_S)


@pytest.mark.parametrize(
    "error",
    [StorageError("no", errno=code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)]
    + [StorageError("no"), CorruptError("no"), ValueError("no")],
    ids=repr,
)
def test_permanent_errors_are_not(error: Exception) -> None:
    assert retry_delay(error, 0) is None
