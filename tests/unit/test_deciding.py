"""What policies are asked, and what they are told about saves and validations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from asyncckpt.checkpointer.deciding import SaveDecider
from asyncckpt.future import SavePromise
from asyncckpt.model import CheckpointInfo, Kind, SaveStats
from asyncckpt.policies import Adaptive, Best, Every, Moment, Validation, When, decide
from tests.unit.test_retention import info


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def begin(decider: SaveDecider, step: int, **metrics: float) -> SavePromise:
    promise = SavePromise(step)
    decider.note_begun(promise.future, metrics)
    return promise


def durable(promise: SavePromise, **stats: float) -> None:
    step_info: CheckpointInfo = info(promise.future.step)
    promise.set_result(step_info, replace(SaveStats(), **stats))  # type: ignore[arg-type]


def train(decider: SaveDecider, clock: Clock, steps: Iterator[int], step_s: float) -> dict[int, Kind]:
    """The saves that are asked for, each of them ignored."""
    asked: dict[int, Kind] = {}
    for step in steps:
        clock.now_s += step_s
        kind = decider.after_step(step)
        if kind is not None:
            asked[step] = kind
    return asked


def test_no_policy_asks_for_nothing(clock: Clock) -> None:
    decider = SaveDecider(None, clock=clock)
    assert train(decider, clock, iter(range(100)), 1000.0) == {}
    assert decider.after_validation(100, {"loss": 1.0}) is None
    assert decider.explain() is None


def test_counting_starts_anew_with_every_save_whoever_asked_for_it(clock: Clock) -> None:
    decider = SaveDecider(Every(steps=10, seconds=6.0), clock=clock)
    assert list(train(decider, clock, iter(range(8)), 1.0)) == [5]
    begin(decider, 8)
    assert list(train(decider, clock, iter(range(8, 17)), 1.0)) == [10, 16]
    decider.note_restored(100)
    assert list(train(decider, clock, iter(range(100, 112)), 1.0)) == [105, 110]


def test_a_step_that_was_just_saved_is_not_saved_again(clock: Clock) -> None:
    class Always(When):
        def due(self, moment: Moment) -> bool:
            return True

    decider = SaveDecider(Always() | Validation(), clock=clock)
    begin(decider, 3)
    assert decider.after_step(3) is None
    assert decider.after_validation(3, {"loss": 1.0}) is None
    assert decider.after_step(4) == "regular"


def test_what_was_reported_about_a_step_is_merged_and_then_forgotten(clock: Clock) -> None:
    decider = SaveDecider(Every(steps=5), clock=clock)
    assert decider.after_validation(5, {"loss": 1.0}) is None
    assert decider.after_validation(5, {"accuracy": 0.5}) is None
    assert decider.validation_of(5) == {"loss": 1.0, "accuracy": 0.5}
    assert decider.validation_of(6) == {}
    decider.after_validation(7, {"loss": 3.0})
    assert decider.validation_of(5) == {}
    decider.note_restored(4)
    assert decider.validation_of(7) == {}, "trained anew, step 7 is another state"


def test_best_compares_with_what_exists_or_is_being_written(clock: Clock) -> None:
    loads = []

    def load() -> dict[int, dict[str, float]]:
        loads.append(1)
        return {1: {"loss": 5.0}, 2: {"loss": 3.0}}

    decider = SaveDecider(Validation(Best("loss")), load, clock=clock)
    assert not loads, "headers are not read before anybody validates"
    assert decider.after_validation(3, {"loss": 4.0}) is None
    assert decider.after_validation(4, {"loss": 2.0}) == "best"
    durable(begin(decider, 4, loss=2.0))
    assert decider.after_validation(5, {"loss": 2.5}) is None
    failed = begin(decider, 6, loss=1.0)
    assert decider.after_validation(7, {"loss": 1.5}) is None
    failed.set_exception(OSError("the disk is full"))
    assert decider.after_validation(8, {"loss": 1.5}) == "best", "that one was never written"
    decider.note_removed(4)
    assert decider.after_validation(9, {"loss": 2.5}) == "best", "that one is gone"
    assert len(loads) == 1


def test_what_is_removed_before_anybody_saw_it_end_is_gone_too(clock: Clock) -> None:
    decider = SaveDecider(Validation(Best("loss")), clock=clock)
    durable(begin(decider, 1, loss=1.0))
    decider.note_removed(1)
    assert decider.after_validation(2, {"loss": 2.0}) == "best"


def test_a_step_saved_anew_is_not_taken_for_the_failed_one(clock: Clock) -> None:
    decider = SaveDecider(Validation(Best("loss")), clock=clock)
    failed = begin(decider, 1, loss=1.0)
    failed.set_exception(OSError("the disk is full"))
    begin(decider, 1, loss=2.0)
    assert decider.after_validation(2, {"loss": 1.5}) == "best"
    assert decider.after_validation(3, {"loss": 2.5}) is None


def test_costs_are_measured_through_the_loop(clock: Clock) -> None:
    policy = Adaptive(max_overhead=0.1, shortest_s=10.0)
    decider = SaveDecider(policy, clock=clock)
    assert list(train(decider, clock, iter(range(1, 11)), 1.0)) == [10]
    promise = begin(decider, 10)
    assert train(decider, clock, iter(range(11, 31)), 1.25) == {}, "not beside another save"
    durable(promise, blocked_s=0.5, durable_s=25.0)
    clock.now_s += 1.25
    assert decider.after_step(31) is None
    assert train(decider, clock, iter(range(32, 52)), 1.0) == {}
    report = decider.explain()
    assert report is not None
    assert report.cost_s == pytest.approx(21 * 0.25)
    assert report.interval_s == pytest.approx(21 * 0.25 / 0.08)  # 65.6 s, of which 46.25 s have passed
    assert list(train(decider, clock, iter(range(52, 80)), 1.0)) == [71]


def test_a_validation_is_not_taken_for_the_cost_of_a_save(clock: Clock) -> None:
    decider = SaveDecider(Adaptive(max_overhead=0.1), clock=clock)
    train(decider, clock, iter(range(1, 11)), 1.0)
    clock.now_s += 400.0
    decider.after_validation(10, {})
    promise = begin(decider, 10)
    clock.now_s += 0.5  # blocked
    train(decider, clock, iter([10]), 0.0)
    train(decider, clock, iter([11, 12]), 1.25)
    clock.now_s += 400.0  # evaluated beside the save
    decider.after_validation(12, {})
    durable(promise, blocked_s=0.5, durable_s=403.0)
    train(decider, clock, iter(range(13, 40)), 1.0)
    report = decider.explain()
    assert report is not None
    assert report.cost_s == pytest.approx(0.5 + 2 * 0.25)


def test_one_decides_for_all(clock: Clock) -> None:
    sent: list[Kind | None] = []

    def first(when: When, moment: Moment) -> Kind | None:
        sent.append(decide(when, moment))
        return sent[-1]

    def other(when: When, moment: Moment) -> Kind | None:
        return sent[-1]

    fast, slow = Clock(), Clock()
    deciding = SaveDecider(Every(seconds=10.0), decide=first, clock=fast)
    following = SaveDecider(Every(seconds=10.0), decide=other, clock=slow)
    for step in range(1, 50):
        fast.now_s += 1.0
        slow.now_s += 0.9
        assert deciding.after_step(step) == following.after_step(step)
    assert [step for step, kind in enumerate(sent, start=1) if kind] == [10, 20, 30, 40]
