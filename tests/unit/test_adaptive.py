"""What saves cost, estimated from step times, and the interval that follows from it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import SaveStats
from asyncckpt.policies import Adaptive, Costs, Every, Moment
from asyncckpt.policies.adaptive import young_daly_interval
from asyncckpt.policies.costs import CostMeter


def measure(meter: CostMeter, at_s: float, steps: list[tuple[float, bool]]) -> float:
    """Let *meter* observe steps of so many seconds, beside a save or not; the time after them."""
    for seconds, in_flight in steps:
        at_s += seconds
        meter.observe(at_s, in_flight)
    return at_s


def end(meter: CostMeter, at_s: float, *saves: SaveStats, step_s: float = 1.0) -> float:
    """All saves in flight have ended; let so many steps pass that they are measured. The time after them."""
    meter.add_saves(saves)
    return measure(meter, at_s, [(step_s, False)] * 20)


def test_cost_is_the_time_of_steps_beside_a_save_beyond_the_median_of_the_others() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 9 + [(50.0, False)])  # one of them evaluated
    at_s = measure(meter, at_s, [(3.0, True), (1.5, True), (1.25, True)])  # blocked for 2 s, then slowed
    end(meter, at_s, SaveStats(blocked_s=2.0, durable_s=3.5))
    assert meter.costs == Costs(num_saves=1, cost_s=2.75, durable_s=3.5, step_s=1.0)


def test_cost_is_never_below_the_blocked_time() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 5)
    at_s = measure(meter, at_s, [(0.9, True), (0.9, True)])
    end(meter, at_s, SaveStats(blocked_s=0.25, durable_s=2.0))
    assert meter.costs is not None
    assert meter.costs.cost_s == 0.25


def test_without_a_step_to_compare_with_cost_is_the_blocked_time() -> None:
    meter = CostMeter()
    at_s = measure(meter, 0.0, [(10.0, True), (10.0, True)])
    end(meter, at_s, SaveStats(blocked_s=0.5, durable_s=20.0))
    assert meter.costs == Costs(num_saves=1, cost_s=0.5, durable_s=20.0)


def test_saves_that_overlap_share_what_they_cost() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 5)
    at_s = measure(meter, at_s, [(2.0, True)] * 4)
    end(meter, at_s, SaveStats(durable_s=2.0), SaveStats(durable_s=3.0))
    assert meter.costs == Costs(num_saves=2, cost_s=2.0, durable_s=3.0, step_s=1.0)


def test_failed_saves_cost_nothing_and_leave_nothing_behind() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 5 + [(9.0, True)] * 3)
    meter.add_saves([])
    assert meter.costs is None
    at_s = measure(meter, at_s, [(1.5, True)] * 2)
    end(meter, at_s, SaveStats(durable_s=3.0))
    assert meter.costs is not None
    assert meter.costs.cost_s == 1.0


def test_time_that_was_no_training_is_left_out() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 5)
    meter.skip(at_s + 500.0)
    # Blocked between validated() and step(): no step, but the time of a save.
    meter.observe(at_s + 500.5, in_flight=True, is_step=False)
    meter.observe(at_s + 502.0, in_flight=True)
    at_s = end(meter, at_s + 502.0, SaveStats(blocked_s=0.5, durable_s=2.0))
    assert meter.costs is not None
    assert meter.costs.cost_s == pytest.approx(1.0)
    meter.skip(at_s + 600.0)
    meter.observe(at_s + 600.0, in_flight=False, is_step=False)
    at_s = measure(meter, at_s + 600.0, [(1.0, True)])
    end(meter, at_s, SaveStats(blocked_s=0.0, durable_s=2.0))
    assert meter.costs.step_s == 1.0


def test_steps_right_after_a_save_count_as_beside_it() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 9 + [(2.0, True)] * 30)
    meter.add_saves([SaveStats(durable_s=55.0)])
    at_s = measure(meter, at_s, [(1.5, False)] * 19)
    assert meter.costs is None
    at_s = measure(meter, at_s, [(1.5, False)] + [(1.0, False)] * 9)
    assert meter.costs == Costs(num_saves=1, cost_s=40.0, durable_s=55.0, step_s=1.0)


def test_steps_after_a_short_save_count_no_longer_than_it_took() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    measure(meter, 0.0, [(100.0, False)] * 9 + [(102.0, True)])
    meter.add_saves([SaveStats(durable_s=1.0)])
    measure(meter, 1002.0, [(101.0, False)])
    assert meter.costs is None
    measure(meter, 1103.0, [(101.0, False)])
    assert meter.costs == Costs(num_saves=1, cost_s=4.0, durable_s=1.0, step_s=100.0)


def test_a_save_right_after_another_ends_the_measurement_of_that_one() -> None:
    meter = CostMeter()
    meter.observe(0.0, False)
    at_s = measure(meter, 0.0, [(1.0, False)] * 9 + [(2.0, True)] * 5)
    meter.add_saves([SaveStats(durable_s=9.0)])
    at_s = measure(meter, at_s, [(1.5, False)] * 2 + [(2.0, True)] * 4)
    end(meter, at_s, SaveStats(durable_s=8.0))
    assert meter.costs == Costs(num_saves=2, cost_s=(6.0 + 4.0) / 2, durable_s=8.5, step_s=1.0)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=30))
def test_costs_move_by_at_most_a_factor_of_two_per_save_and_never_get_stuck(saves: list[tuple[float, float]]) -> None:
    meter, before, at_s = CostMeter(), None, 0.0
    for blocked_s, durable_s in saves:
        at_s = measure(meter, at_s, [(1.0, True)])
        at_s = end(meter, at_s, SaveStats(blocked_s=blocked_s, durable_s=durable_s))
        costs = meter.costs
        assert costs is not None
        if before is not None:
            for old, new in ((before.cost_s, costs.cost_s), (before.durable_s, costs.durable_s)):
                assert old / 2 <= new <= old * 2
        before = costs
    for _ in range(60):  # from anywhere to anywhere
        at_s = measure(meter, at_s, [(1.0, True)])
        at_s = end(meter, at_s, SaveStats(blocked_s=3.0, durable_s=7.0))
    assert meter.costs is not None
    assert meter.costs.cost_s == pytest.approx(3.0, rel=0.01)
    assert meter.costs.durable_s == pytest.approx(7.0, rel=0.01)


def test_the_optimum_of_young_and_daly() -> None:
    # Losses at interval T are cost/T + T/(2 mtbf), which no other interval makes smaller.
    cost_s, mtbf_s = 18.0, 36_000.0
    best = young_daly_interval(cost_s, mtbf_s)
    assert best == pytest.approx(1138.4, abs=0.1)

    def loss(interval_s: float) -> float:
        return cost_s / interval_s + interval_s / (2 * mtbf_s)

    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


def test_the_interval_is_the_longest_that_anything_asks_for_and_says_which() -> None:
    costs = Costs(num_saves=3, cost_s=0.4, durable_s=20.0)
    capped = Adaptive(max_overhead=0.01).plan(costs)
    assert (capped.interval_s, capped.overhead) == (pytest.approx(50.0), pytest.approx(0.008))
    assert capped.reason == "0.4 s per save may be at most 1.00% of the time"
    durable = Adaptive(max_overhead=0.1, shortest_s=1.0).plan(costs)
    assert (durable.interval_s, durable.reason) == (20.0, "a save must be durable before the next begins")
    shortest = Adaptive(max_overhead=0.1).plan(costs)
    assert (shortest.interval_s, shortest.reason) == (30.0, "the lower bound shortest_s")
    optimal = Adaptive(mtbf=36_000.0).plan(costs)
    assert optimal.interval_s == pytest.approx(math.sqrt(2 * 0.4 * 36_000))
    assert optimal.reason == "sqrt(2 * 0.4 s * 36000 s) of Young and Daly"
    assert Adaptive(mtbf=36.0).plan(costs) == capped, "the cap wins over an optimum that would cost more"


@pytest.mark.parametrize(
    ("policy", "first_s"),
    [
        (Adaptive(), 30.0),
        (Adaptive(mtbf=400.0), 30.0),
        (Adaptive(mtbf=3600.0), 180.0),
        (Adaptive(mtbf=1e6), 300.0),
        (Adaptive(mtbf=1e6, shortest_s=1000.0), 1000.0),
    ],
)
def test_the_first_save_is_due_before_anything_is_known(policy: Adaptive, first_s: float) -> None:
    report = policy.plan(None)
    assert (report.interval_s, report.cost_s, report.overhead) == (first_s, 0.0, 0.0)
    assert "first" in report.reason
    assert policy.due(Moment(7, first_s))
    assert not policy.due(Moment(7, first_s - 1.0))


costs_ = st.builds(Costs, st.just(1), st.floats(1e-6, 1e4), st.floats(1e-6, 1e5))
adaptives = st.builds(Adaptive, st.floats(1e-4, 0.5), st.none() | st.floats(1.0, 1e7), st.floats(1e-3, 100.0))


@given(adaptives, costs_, st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_the_interval_keeps_its_promises(policy: Adaptive, costs: Costs, cost_by: float, durable_by: float) -> None:
    report = policy.plan(costs)
    assert report.overhead <= policy.max_overhead
    assert report.overhead == pytest.approx(costs.cost_s / report.interval_s)
    assert report.interval_s >= max(costs.durable_s, policy.shortest_s)
    if policy.mtbf is not None:
        assert report.interval_s >= young_daly_interval(costs.cost_s, policy.mtbf)
    moved = policy.plan(Costs(2, costs.cost_s * cost_by, costs.durable_s * durable_by))
    assert 0.5 <= moved.interval_s / report.interval_s * (1 + 1e-9) <= 2.0 * (1 + 2e-9)


def test_due_from_the_last_save_of_any_kind_on_and_never_beside_one() -> None:
    policy = Adaptive(max_overhead=0.01)
    costs = Costs(num_saves=1, cost_s=0.8, durable_s=2.0)  # an interval of 100 s
    assert not policy.due(Moment(7, 1099.0, 5, 1000.0, costs=costs))
    assert policy.due(Moment(7, 1100.0, 5, 1000.0, costs=costs))
    assert not policy.due(Moment(7, 1100.0, 5, 1000.0, costs=costs, in_flight=True))
    assert policy.due(Moment(7, 30.0))
    assert not policy.due(Moment(7, 29.0))
    joined = Every(steps=5) | policy
    assert joined.explain(Moment(7, 1100.0, costs=costs)) == policy.plan(costs)
    assert Every(steps=5).explain(Moment(7, 0.0)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_overhead": 0.0},
        {"max_overhead": 1.0},
        {"max_overhead": -0.1},
        {"max_overhead": "1%"},
        {"mtbf": 0},
        {"mtbf": math.nan},
        {"mtbf": math.inf},
        {"shortest_s": 0},
        {"shortest_s": None},
    ],
)
def test_adaptive_refuses(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionError):
        Adaptive(**options)  # type: ignore[arg-type]
