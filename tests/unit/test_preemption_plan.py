"""What is flushed, in which order, and why: the decision, without any I/O."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.model import SaveStats
from asyncckpt.preemption.bandwidth import UNKNOWN_BANDWIDTH, Bandwidth, BandwidthMeter
from asyncckpt.preemption.plan import FlushPlan, StagedSave, plan_flush

MB = 10**6


def bandwidth(compressed_mb_s: float, plain_mb_s: float) -> Bandwidth:
    """A storage that costs nothing and a CPU that takes the time, so that the rates are easy to see."""
    return Bandwidth(1 / (compressed_mb_s * MB), 1 / (plain_mb_s * MB), 1e-15, 1.0, 0.0)


def save(number: int, raw_mb: float = 100, done_mb: float = 0, **facts: bool) -> StagedSave:
    return StagedSave(number, 10 * number, int(raw_mb * MB), int(done_mb * MB), **facts)


def outcome(plan: FlushPlan) -> tuple[list[int], list[int], bool]:
    return list(plan.order), list(plan.lost_steps), plan.compress


EVEN = bandwidth(10, 10)


@pytest.mark.parametrize(
    ("staged", "rates", "time_left_s", "expected"),
    [
        pytest.param([], EVEN, 1, ([], [], True), id="nothing is staged"),
        pytest.param([save(2), save(1)], EVEN, 20.5, ([1, 2], [], True), id="all of it, in the order it was saved"),
        pytest.param([save(1), save(2)], bandwidth(5, 20), 15, ([1, 2], [], False), id="all, only without compressing"),
        pytest.param([save(1), save(2)], bandwidth(5, 20), 40.5, ([1, 2], [], True), id="plain is faster, not needed"),
        pytest.param([save(1), save(2)], EVEN, 15, ([2, 1], [10], True), id="one of two: the newest"),
        pytest.param([save(1), save(2)], bandwidth(5, 9), 15, ([2, 1], [10], False), id="one of two, plain"),
        pytest.param([save(1), save(2), save(3)], EVEN, 25, ([3, 2, 1], [10], True), id="two of three, newest first"),
        pytest.param(
            [save(1, is_begun=True, done_mb=90), save(2), save(3)],
            EVEN,
            15,
            ([1, 3, 2], [20], True),
            id="what is nearly done is not interrupted when there is time for the newest too",
        ),
        pytest.param(
            [save(1, is_begun=True, done_mb=10), save(2)],
            EVEN,
            15,
            ([2, 1], [10], True),
            id="the older one is put back",
        ),
        pytest.param(
            [save(1, is_begun=True, done_mb=10, is_repeatable=False), save(2)],
            EVEN,
            15,
            ([1, 2], [20], True),
            id="a streamed one is not put back",
        ),
        pytest.param(
            [save(1, 20), save(2, 1000)], EVEN, 5, ([1, 2], [20], True), id="the newest is too large: the one before"
        ),
        pytest.param(
            [save(1, is_begun=True, done_mb=80), save(2)],
            EVEN,
            1,
            ([1, 2], [10, 20], True),
            id="nothing makes it: what has the least left goes on",
        ),
        pytest.param(
            [save(1), save(2)], EVEN, 1, ([2, 1], [20, 10], True), id="nothing makes it: the newest goes first"
        ),
        pytest.param([save(1)], EVEN, -3, ([1], [10], True), id="the time is up"),
    ],
)
def test_plans(
    staged: list[StagedSave], rates: Bandwidth, time_left_s: float, expected: tuple[list[int], list[int], bool]
) -> None:
    assert outcome(plan_flush(staged, rates, time_left_s)) == expected


def test_every_decision_has_its_reason() -> None:
    plan = plan_flush([save(1), save(2)], EVEN, 15)
    assert [(entry.step, entry.makes_it, entry.reason) for entry in plan.decisions] == [
        (20, True, "durable in 10.0 s, 15.0 s are left"),
        (10, False, "not durable in time: ready in 20.0 s, 15.0 s are left"),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=5),
    st.integers(-1, 4),
    st.booleans(),
    st.integers(0, 60),
    st.sampled_from([EVEN, bandwidth(5, 20), bandwidth(20, 5)]),
)
def test_the_newest_save_that_could_make_it_alone_makes_it(
    sizes: list[tuple[int, int]], begun: int, is_repeatable: bool, time_left_s: int, rates: Bandwidth
) -> None:
    staged = [
        save(
            number,
            raw,
            min(raw, done) if number == begun else 0,
            is_begun=number == begun,
            is_repeatable=is_repeatable or number != begun,
        )
        for number, (raw, done) in enumerate(sizes)
    ]
    plan = plan_flush(staged, rates, time_left_s)
    assert sorted(plan.order) == [entry.save_id for entry in staged]
    stuck = next((entry for entry in staged if not entry.is_repeatable), None)

    def alone_s(entry: StagedSave) -> float:
        before = [stuck] if stuck is not None and stuck is not entry else []
        return min(
            sum(rates.seconds(part.rest_bytes, compress=compress) for part in [*before, entry])
            for compress in (True, False)
        )

    possible = [entry.save_id for entry in staged if alone_s(entry) <= time_left_s]
    made = [entry.save_id for entry in plan.decisions if entry.makes_it]
    if possible:
        assert max(possible) in made
    if stuck is not None:
        assert plan.order[0] == stuck.save_id


def test_a_plan_follows_from_one_whose_saves_have_ended() -> None:
    earlier = plan_flush([save(1), save(2), save(3)], EVEN, 25)
    assert earlier.follows_from(earlier)
    assert not earlier.follows_from(None)
    assert plan_flush([save(2), save(1)], EVEN, 15.0).follows_from(earlier)
    assert not plan_flush([save(1), save(2)], EVEN, 100.0).follows_from(earlier)
    assert not plan_flush([save(3), save(4)], EVEN, 100.0).follows_from(earlier)


# -- bandwidth -------------------------------------------------------------------------------------


def stats(**changes: float) -> SaveStats:
    known = SaveStats(
        stage_s=1.0,
        encode_s=6.0,
        write_s=2.0,
        commit_s=0.5,
        durable_s=5.5,
        raw_bytes=400 * MB,
        stored_bytes=200 * MB,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def test_before_any_save_the_estimate_is_modest() -> None:
    assert BandwidthMeter().bandwidth == UNKNOWN_BANDWIDTH
    assert 50 * MB < UNKNOWN_BANDWIDTH.bytes_s(compress=True) < UNKNOWN_BANDWIDTH.bytes_s(compress=False) < 150 * MB


def test_the_estimate_reproduces_the_save_it_comes_from() -> None:
    meter = BandwidthMeter()
    meter.note(stats())
    assert meter.bandwidth.seconds(400 * MB, compress=True) == pytest.approx(4.5)
    # 3 of the 4 seconds were spent encoding; plain takes a gigabyte per second of that, and writes twice as much.
    assert meter.bandwidth.bytes_s(compress=False) == pytest.approx(400 * MB / (0.4 + 2.0))


def test_what_was_linked_was_not_written() -> None:
    meter = BandwidthMeter()
    meter.note(stats(linked_bytes=100 * MB))
    assert meter.bandwidth.bytes_s(compress=True) == pytest.approx(200 * MB / 4)


def test_the_slowest_of_the_last_three_counts_and_small_saves_do_not() -> None:
    meter = BandwidthMeter()
    for durable_s in (101.5, 21.5, 41.5, 11.5):
        meter.note(stats(durable_s=durable_s))
    meter.note(stats(raw_bytes=1000, stored_bytes=1000))
    meter.note(SaveStats())
    assert meter.bandwidth.bytes_s(compress=True) == pytest.approx(400 * MB / 40)


def test_a_slower_storage_makes_compressing_worth_more() -> None:
    known = Bandwidth(1 / (100 * MB), 1 / (1000 * MB), 1 / (1000 * MB), 0.5, 0.0)
    assert known.bytes_s(compress=False) > known.bytes_s(compress=True)
    slow = known.as_observed(2 * MB, compress=True)
    assert slow.bytes_s(compress=True) == pytest.approx(2 * MB)
    assert slow.bytes_s(compress=False) < slow.bytes_s(compress=True)
    assert known.as_observed(1000 * MB, compress=False).bytes_s(compress=False) == pytest.approx(1000 * MB, rel=0.01)
