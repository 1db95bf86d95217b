from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import InvalidOptionError
from asyncckpt.policies import AtSteps, Every, When


def saved_steps(policy: When, steps: range, step_s: float = 1.0) -> list[int]:
    """Run a loop over *steps* that takes *step_s* per step, and save whenever *policy* says so."""
    saved: list[int] = []
    last_step: int | None = None
    last_s = now_s = 0.0
    for step in steps:
        now_s += step_s
        if policy.due(step, now_s, last_step, last_s):
            saved.append(step)
            last_step, last_s = step, now_s
    return saved


def test_every_steps_saves_at_round_numbers_and_not_at_zero() -> None:
    assert saved_steps(Every(steps=500), range(1601)) == [500, 1000, 1500]


def test_every_steps_with_a_stride_saves_at_the_first_step_after_each_multiple() -> None:
    assert saved_steps(Every(steps=10), range(0, 50, 7)) == [14, 21, 35, 42]


def test_every_steps_stays_round_when_something_else_saved_in_between() -> None:
    assert saved_steps(Every(steps=500) | AtSteps(620), range(1100)) == [500, 620, 1000]


def test_a_resumed_run_goes_on_in_the_same_rhythm() -> None:
    assert Every(steps=500).due(501, 0.0, 500, 0.0) is False
    assert Every(steps=500).due(1000, 0.0, 500, 0.0) is True
    assert Every(steps=500).due(1001, 0.0, 500, 0.0) is True


def test_a_rewound_loop_keeps_saving() -> None:
    assert Every(steps=500).due(3001, 0.0, 5000, 0.0) is True
    assert Every(steps=500).due(3002, 0.0, 3001, 0.0) is False


def test_every_seconds_counts_from_the_last_save() -> None:
    assert saved_steps(Every(seconds=2.5), range(10), step_s=1.0) == [2, 5, 8]
    assert saved_steps(Every(minutes=1), range(100), step_s=20.0) == list(range(2, 100, 3))


def test_every_with_both_is_due_by_whichever_comes_first() -> None:
    assert saved_steps(Every(steps=10, seconds=6), range(21)) == [5, 10, 16, 20]


def test_at_steps_saves_once_each_also_when_jumped_over() -> None:
    assert saved_steps(AtSteps(100, 0, 7, 7), range(200)) == [0, 7, 100]
    assert saved_steps(AtSteps(5, 6, 20), range(0, 40, 4)) == [8, 20]


def test_at_steps_below_the_restored_step_are_past() -> None:
    assert AtSteps(5).due(10, 0.0, 7, 0.0) is False


def test_or_joins_flat_and_compares_by_value() -> None:
    a, b, c = Every(steps=5), AtSteps(3), Every(minutes=1)
    assert (a | b) | c == a | (b | c)
    assert hash(a | b) == hash(a | b)
    assert a | b != b | a


def test_or_with_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Every(steps=5) | 3  # type: ignore[operator]


def test_a_policy_of_ones_own() -> None:
    class OnPrimes(When):
        def due(self, step: int, now_s: float, last_step: int | None, last_s: float) -> bool:
            return step in (2, 3, 5)

    assert saved_steps(OnPrimes() | Every(steps=4), range(10)) == [2, 3, 4, 5, 8]


def test_a_policy_needs_due() -> None:
    with pytest.raises(TypeError):
        When()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 0},
        {"steps": -5},
        {"steps": 1.5},
        {"steps": True},
        {"steps": "500"},
        {"seconds": 0},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": True},
        {"minutes": 0},
        {"minutes": "10"},
        {"seconds": 60, "minutes": 1},
    ],
)
def test_every_refuses(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionError):
        Every(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [(), (-1,), (1.0,), (True,), ("3",)])
def test_at_steps_refuses(steps: tuple[object, ...]) -> None:
    with pytest.raises(InvalidOptionError):
        AtSteps(*steps)  # type: ignore[arg-type]


@given(
    interval=st.integers(1, 50),
    strides=st.lists(st.integers(1, 120), max_size=40),
)
def test_no_multiple_is_ever_missed(interval: int, strides: list[int]) -> None:
    policy, last, step = Every(steps=interval), None, 0
    for stride in strides:
        before, step = step, step + stride
        crossed = any(number % interval == 0 for number in range(before + 1, step + 1))
        assert policy.due(step, 0.0, last, 0.0) == crossed
        if crossed:
            last = step
