"""How many threads of the writer may encode at a time."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from asyncckpt.writer.cores import CoreBudget, choose_workers, plan_cores, read_busy_s


@pytest.mark.parametrize(
    ("num_cpus", "busy", "most", "cores"),
    [
        (2, 0.0, 2, 2),  # training waits
        (2, 0.2, 2, 2),
        (2, 1.0, 2, 1),  # training launches kernels all the time
        (2, 2.0, 2, 1),  # never none at all
        (1, 0.0, 1, 1),
        (16, 1.5, 8, 8),
        (16, 11.0, 8, 5),
        (16, 40.0, 8, 1),
    ],
)
def test_the_writer_takes_the_cores_that_nobody_uses(num_cpus: int, busy: float, most: int, cores: int) -> None:
    assert plan_cores(num_cpus, busy, most) == cores


class Machine:
    """A clock and what others have used of the cores so far."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.busy_s = 0.0

    def budget(self, num_cpus: int = 4) -> CoreBudget:
        return CoreBudget(num_cpus, num_cpus, 1, lambda: self.busy_s, lambda: self.now_s)

    def let_pass(self, seconds: float, busy: float) -> None:
        self.now_s += seconds
        self.busy_s += seconds * busy


def test_the_budget_follows_the_load() -> None:
    machine = Machine()
    budget = machine.budget()
    with budget:
        assert budget.limit == 1
    limits = []
    for busy in (0.0, 1.0, 3.9, 2.0):
        machine.let_pass(1, busy)
        with budget:
            limits.append(budget.limit)
    assert limits == [4, 3, 1, 2]


def test_a_moment_is_too_short_to_judge_by() -> None:
    machine = Machine()
    budget = machine.budget()
    machine.let_pass(0.01, 0.0)
    with budget:
        assert budget.limit == 1


def test_no_more_threads_are_inside_than_the_limit_says_and_a_wider_one_lets_them_in() -> None:
    machine = Machine()
    budget = machine.budget()
    inside, leave = threading.Semaphore(0), threading.Semaphore(0)

    def work() -> None:
        with budget:
            inside.release()
            leave.acquire()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=30)
    assert not inside.acquire(blocking=False)
    machine.let_pass(1, 2.0)
    leave.release()  # one leaves, measures, and two may come in
    assert inside.acquire(timeout=30)
    assert inside.acquire(timeout=30)
    for _ in threads:
        leave.release()
    for thread in threads:
        thread.join()
    with budget:
        pass


def test_threads_that_the_user_chose_stay_as_they_are() -> None:
    num_workers, budget = choose_workers(3, is_own_process=True)
    assert (num_workers, budget.limit) == (3, 3)


def test_by_default_more_threads_write_than_may_encode() -> None:
    num_workers, budget = choose_workers(None, is_own_process=True)
    assert budget.limit < num_workers


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat")
def test_what_others_use_is_what_the_cores_did_without_this_process() -> None:
    before_s = read_busy_s()
    own_s = os.times().user
    while os.times().user < own_s + 0.5:
        pass
    after_s = read_busy_s()
    assert before_s is not None
    assert after_s is not None
    # Others may have been busy on every other core, but our half second is not among it (ticks are 10 ms).
    assert after_s - before_s > -0.1
