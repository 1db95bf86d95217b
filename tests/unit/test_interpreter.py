"""Work that mostly waits for the interpreter's own lock, and its garbage collector."""

from __future__ import annotations

import gc
import threading

import pytest

from asyncckpt.interpreter import Lane, collector_paused

TIMEOUT_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def enters_beside(lane: Lane) -> tuple[threading.Thread, threading.Event]:
    """A thread that wants into *lane*, and whether it is in."""
    entered = threading.Event()

    def enter() -> None:
        with lane.batch(1):
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    return thread, entered


def test_one_thread_at_a_time_while_the_storage_is_quick() -> None:
    lane = Lane(Clock())
    with lane.batch(1):
        thread, entered = enters_beside(lane)
        assert not entered.wait(0.05)
    thread.join(TIMEOUT_S)
    assert entered.is_set()


def test_any_number_of_threads_when_a_batch_was_slow_and_one_again_later() -> None:
    clock = Clock()
    lane = Lane(clock)
    with lane.batch(10):
        clock.now_s += 0.0051
    with lane.batch(10):
        thread, entered = enters_beside(lane)
        assert entered.wait(TIMEOUT_S)
        thread.join(TIMEOUT_S)
        clock.now_s += 0.0049
    with lane.batch(10):
        thread, entered = enters_beside(lane)
        assert not entered.wait(0.05)
    thread.join(TIMEOUT_S)


def test_a_batch_that_fails_lets_the_next_one_in() -> None:
    lane = Lane(Clock())
    with pytest.raises(OSError, match="full"), lane.batch(1):
        raise OSError("full")
    with lane.batch(1):
        pass


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_afterwards_as_it_was(is_enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with collector_paused():
            assert not gc.isenabled()
            with collector_paused():
                assert not gc.isenabled()
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
