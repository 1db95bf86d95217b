from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import Kind
from asyncckpt.policies import AtSteps, Best, Every, Moment, Validation, When, decide


def saved_steps(policy: When, steps: range, step_s: float = 1.0) -> list[int]:
    """Run a loop over *steps* that takes *step_s* per step, and save whenever *policy* says so."""
    saved: list[int] = []
    last_step: int | None = None
    last_s = now_s = 0.0
    for step in steps:
        now_s += step_s
        if policy.due(Moment(step, now_s, last_step, last_s)):
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
    assert Every(steps=500).due(Moment(501, 0.0, 500, 0.0)) is False
    assert Every(steps=500).due(Moment(1000, 0.0, 500, 0.0)) is True
    assert Every(steps=500).due(Moment(1001, 0.0, 500, 0.0)) is True


def test_a_rewound_loop_keeps_saving() -> None:
    assert Every(steps=500).due(Moment(3001, 0.0, 5000, 0.0)) is True
    assert Every(steps=500).due(Moment(3002, 0.0, 3001, 0.0)) is False


def test_every_seconds_counts_from_the_last_save() -> None:
    assert saved_steps(Every(seconds=2.5), range(10), step_s=1.0) == [2, 5, 8]
    assert saved_steps(Every(minutes=1), range(100), step_s=20.0) == list(range(2, 100, 3))


def test_every_with_both_is_due_by_whichever_comes_first() -> None:
    assert saved_steps(Every(steps=10, seconds=6), range(21)) == [5, 10, 16, 20]


def test_at_steps_saves_once_each_also_when_jumped_over() -> None:
    assert saved_steps(AtSteps(100, 0, 7, 7), range(200)) == [0, 7, 100]
    assert saved_steps(AtSteps(5, 6, 20), range(0, 40, 4)) == [8, 20]


def test_at_steps_below_the_restored_step_are_past() -> None:
    assert AtSteps(5).due(Moment(10, 0.0, 7, 0.0)) is False


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
        def due(self, moment: Moment) -> bool:
            return moment.step in (2, 3, 5)

    assert saved_steps(OnPrimes() | Every(steps=4), range(10)) == [2, 3, 4, 5, 8]


def validated(policy: When, metrics: dict[str, float], *saved: dict[str, float]) -> Kind | None:
    """What *policy* makes of a validation, beside checkpoints with the metrics *saved*."""
    return decide(policy, Moment(5, 0.0, validation=metrics, saved=saved))


def test_only_validation_policies_answer_a_validation() -> None:
    class Always(When):
        def due(self, moment: Moment) -> bool:
            return True

    assert validated(Always() | Every(steps=1, seconds=1e-9) | AtSteps(5), {"loss": 1.0}) is None
    assert validated(Every(steps=500) | Validation(), {}) == "validation"
    assert decide(Validation(), Moment(5, 0.0)) is None
    assert decide(Validation(), Moment(5, 0.0, saved=({"loss": 1.0},))) is None


def test_validation_that_is_among_the_best_is_saved_as_best() -> None:
    lowest, highest_two = Validation(Best("loss")), Validation(Best("loss", "max", n=2))
    assert validated(lowest, {"loss": 1.0}) == "best"
    assert validated(lowest, {"loss": 1.0}, {"loss": 1.5}, {"other": 0.0}, {}) == "best"
    assert validated(lowest, {"loss": 1.0}, {"loss": 0.5}, {"loss": 1.5}) is None
    assert validated(highest_two, {"loss": 1.0}, {"loss": 1.5}, {"loss": 0.5}) == "best"
    assert validated(highest_two, {"loss": 1.0}, {"loss": 1.5}, {"loss": 1.2}) is None
    assert validated(lowest, {"other": 1.0}) is None


def test_nan_is_never_best_and_never_in_the_way() -> None:
    nan, inf = float("nan"), float("inf")
    assert validated(Validation(Best("loss")), {"loss": nan}) is None
    assert validated(Validation(Best("loss")), {"loss": 9.0}, {"loss": nan}) == "best"
    assert validated(Validation(Best("loss", "max")), {"loss": -9.0}, {"loss": nan}) == "best"
    assert validated(Validation(Best("loss")), {"loss": 9.0}, {"loss": inf}) == "best"
    assert validated(Validation(Best("loss")), {"loss": 9.0}, {"loss": -inf}) is None


def test_an_equal_value_came_first() -> None:
    assert validated(Validation(Best("loss")), {"loss": 1.0}, {"loss": 1.0}) is None
    assert validated(Validation(Best("loss", n=2)), {"loss": 1.0}, {"loss": 1.0}) == "best"


def test_best_goes_before_validation_and_that_before_regular() -> None:
    both = Validation() | Validation(Best("loss"))
    assert validated(both, {"loss": 1.0}, {"loss": 2.0}) == "best"
    assert validated(both, {"loss": 3.0}, {"loss": 2.0}) == "validation"


def test_a_policy_of_ones_own_may_name_the_kind() -> None:
    class AtTheEnd(When):
        kind: Kind = "final"  # type: ignore[assignment]

        def due(self, moment: Moment) -> bool:
            return moment.step == 10

    assert decide(AtTheEnd() | Every(steps=4), Moment(10, 0.0, 8)) == "final"
    assert decide(AtTheEnd() | Every(steps=5), Moment(10, 0.0, 8)) == "regular"


def test_validation_refuses() -> None:
    with pytest.raises(InvalidOptionError):
        Validation("loss")  # type: ignore[arg-type]


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
        assert policy.due(Moment(step, 0.0, last, 0.0)) == crossed
        if crossed:
            last = step
