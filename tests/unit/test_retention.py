from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies import Best, Keep
from asyncckpt.policies.keep import rank_best
from asyncckpt.repository.retention import plan_retention

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=2)


def info(
    step: int, *, at_s: float | None = None, loss: float | None = None, tags: Sequence[str] = (), kind: str = "regular"
) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        path=f"/root/step-{step:08}",
        kind=kind,
        created=START + timedelta(seconds=step if at_s is None else at_s),
        raw_bytes=1,
        stored_bytes=1,
        num_arrays=1,
        world_size=1,
        format=1,
        nonce=str(step),
        metrics={} if loss is None else {"loss": loss},
        tags=tuple(tags),
    )


def kept(committed: Sequence[CheckpointInfo], keep: Keep) -> list[int]:
    plan = plan_retention(committed, keep, NOW)
    assert {decision.step for decision in plan.keep + plan.remove} == {info.step for info in committed}
    assert len(plan.keep) + len(plan.remove) == len(committed)
    return [decision.step for decision in plan.keep]


def test_last_keeps_the_newest_by_step_in_any_order() -> None:
    committed = [info(step) for step in (3, 1, 5, 2, 4)]
    assert kept(committed, Keep(last=2)) == [5, 4]
    assert kept(committed, Keep(last=None)) == [5, 4, 3, 2, 1]


def test_a_run_that_went_back_keeps_what_it_saves() -> None:
    committed = [info(step, at_s=step) for step in (100, 200, 300)]
    committed.append(info(101, at_s=1000))
    assert kept(committed, Keep(last=1)) == [300, 101]
    committed.append(info(102, at_s=1001))
    assert kept(committed, Keep(last=1)) == [300, 102]
    assert kept(committed, Keep(last=2)) == [300, 200, 102, 101]
    committed.append(info(301, at_s=1002))
    assert kept(committed, Keep(last=1)) == [301]
    plan = plan_retention([info(2, at_s=0), info(1, at_s=1)], Keep(last=1), NOW)
    assert [decision.reason for decision in plan.keep] == ["newest", "last 1 saved"]


def test_a_clock_that_was_set_back_keeps_at_most_as_many_again() -> None:
    committed = [info(step, at_s=-step) for step in range(10)]
    assert kept(committed, Keep(last=3)) == [9, 8, 7, 2, 1, 0]


def test_metrics_of_any_kind_are_survived() -> None:
    values = [None, "0.1", 10**400, -(10**400), math.nan, [0.1], 0.5, {"loss": 0.1}]
    committed = [replace(info(step), metrics={"loss": value}) for step, value in enumerate(values)]
    assert kept(committed, Keep(last=1, best=Best("loss", n=9))) == [7, 6]


def test_nothing_committed_is_no_problem() -> None:
    assert kept([], Keep(last=1, every_steps=5, best=Best("loss"))) == []


def test_every_steps_keeps_the_first_of_each_period() -> None:
    committed = [info(step) for step in (0, 500, 1000, 1500, 2100, 2500, 2700)]
    assert kept(committed, Keep(last=1, every_steps=1000)) == [2700, 2100, 1000, 0]


def test_every_seconds_keeps_the_first_of_each_period() -> None:
    committed = [info(step, at_s=step * 1800) for step in range(8)]
    assert kept(committed, Keep(last=1, every_seconds=3600)) == [7, 6, 4, 2, 0]


def test_tags_protect() -> None:
    committed = [info(1, tags=["paper"]), info(2, tags=["scratch"]), info(3), info(4)]
    assert kept(committed, Keep(last=1)) == [4, 2, 1]
    assert kept(committed, Keep(last=1, tags=("paper",))) == [4, 1]
    assert kept(committed, Keep(last=1, tags=())) == [4]


def test_kinds_protect() -> None:
    kinds = ("final", "manual", "regular", "best", "emergency", "validation", "of another program", "regular")
    committed = [info(step, kind=kind) for step, kind in enumerate(kinds, start=1)]
    assert kept(committed, Keep(last=1)) == [8, 2, 1]
    assert kept(committed, Keep(last=1, kinds=("emergency",))) == [8, 5]
    assert kept(committed, Keep(last=1, kinds=())) == [8]
    assert kept(committed, Keep(last=4, kinds=())) == [8, 7, 6, 5], "all kinds count among the last"


def test_best_keeps_the_best_and_nan_never_wins() -> None:
    committed = [
        info(1, loss=0.5),
        info(2, loss=math.nan),
        info(3, loss=0.1),
        info(4, loss=0.9),
        info(5),
        info(6, loss=math.inf),
    ]
    assert kept(committed, Keep(last=1, best=Best("loss"))) == [6, 3]
    assert kept(committed, Keep(last=1, best=Best("loss", "min", n=2))) == [6, 3, 1]
    assert kept(committed, Keep(last=1, best=Best("loss", "max"))) == [6]
    assert kept(committed, Keep(last=1, best=Best("loss", "max", n=2))) == [6, 4]
    assert kept(committed, Keep(last=1, best=Best("accuracy"))) == [6]


def test_of_equal_values_the_earliest_is_best() -> None:
    committed = [info(step, loss=0.5) for step in (3, 1, 2)]
    assert [found.step for found in rank_best(committed, Best("loss", "max"))] == [1, 2, 3]


def test_every_decision_has_a_reason() -> None:
    committed = [info(10, loss=0.1, tags=["a", "b"]), info(20), info(30, at_s=86_400 * 1.5)]
    plan = plan_retention(committed, Keep(last=2, every_steps=10, best=Best("loss")), NOW)
    assert [(decision.step, decision.reason) for decision in plan.keep] == [
        (30, "newest, every 10 steps"),
        (20, "last 2, every 10 steps"),
        (10, "tagged a, b, best 1 by loss, every 10 steps"),
    ]
    plan = plan_retention([info(1, at_s=86_400), info(2, at_s=86_400)], Keep(last=1), NOW)
    assert [(decision.step, decision.reason) for decision in plan.remove] == [(1, "no rule keeps it; 1.0 d old")]
    plan = plan_retention(
        [info(1, at_s=86_400, kind="emergency"), info(2, at_s=90_000, kind="final")], Keep(last=1), NOW
    )
    assert [decision.reason for decision in plan.keep] == ["newest, kind final"]
    assert [decision.reason for decision in plan.remove] == ["no rule keeps it; emergency, 1.0 d old"]


@pytest.mark.parametrize(("age_s", "text"), [(-5, "0 s"), (42, "42 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_the_age_of_a_removed_step_is_told(age_s: float, text: str) -> None:
    committed = [info(1, at_s=86_400 * 2 - age_s), info(2, at_s=86_400 * 3)]
    assert plan_retention(committed, Keep(last=1), NOW).remove[0].reason.endswith(f"; {text} old")


def test_a_creation_time_without_a_zone_is_utc() -> None:
    naive = replace(info(1, at_s=0), created=START.replace(tzinfo=None))
    plan = plan_retention([naive, info(2)], Keep(last=1, every_seconds=1e9), NOW)
    assert [decision.step for decision in plan.keep] == [2, 1]
    assert plan_retention([naive, info(2)], Keep(last=1), NOW).remove[0].reason.endswith("; 2.0 d old")


losses = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers()
histories = st.lists(
    st.builds(
        info,
        st.integers(0, 3000),
        at_s=st.floats(0, 1e6),
        loss=losses,
        tags=st.lists(st.sampled_from("ab")),
        kind=st.sampled_from(["regular"] * 4 + ["final", "manual", "best", "odd"]),
    ),
    unique_by=lambda found: found.step,
    max_size=30,
)
keeps = st.builds(
    Keep,
    last=st.none() | st.integers(1, 5),
    every_steps=st.none() | st.integers(1, 1000),
    every_seconds=st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
    best=st.none() | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
    tags=st.none() | st.just(("a",)),
    kinds=st.just(("manual", "final")) | st.sampled_from([(), ("best",)]),
)


@given(histories, keeps)
def test_the_newest_best_and_tagged_are_never_removed(committed: list[CheckpointInfo], keep: Keep) -> None:
    survivors = set(kept(committed, keep))
    if committed:
        assert max(found.step for found in committed) in survivors
    protecting = {"a", "b"} if keep.tags is None else set(keep.tags)
    assert {found.step for found in committed if protecting & set(found.tags)} <= survivors
    assert {found.step for found in committed if found.kind in keep.kinds} <= survivors
    with_loss = [found.metrics["loss"] for found in committed if not math.isnan(found.metrics.get("loss", math.nan))]
    if keep.best is not None and with_loss:
        best = min(with_loss) if keep.best.mode == "min" else max(with_loss)
        assert any(found.metrics.get("loss") == best for found in committed if found.step in survivors)


@given(histories, keeps)
def test_planning_again_removes_nothing_more(committed: list[CheckpointInfo], keep: Keep) -> None:
    survivors = set(kept(committed, keep))
    left = [found for found in committed if found.step in survivors]
    assert set(kept(left, keep)) == survivors


@given(histories, keeps, keeps)
def test_a_rule_added_never_removes_a_step(committed: list[CheckpointInfo], keep: Keep, other: Keep) -> None:
    wider = Keep(
        last=None if keep.last is None or other.last is None else max(keep.last, other.last),
        every_steps=keep.every_steps or other.every_steps,
        every_seconds=keep.every_seconds or other.every_seconds,
        best=keep.best or other.best,
        kinds=tuple({*keep.kinds, *other.kinds}),
    )
    assert set(kept(committed, keep)) <= set(kept(committed, wider))


@given(histories, keeps)
def test_saving_and_pruning_step_by_step_keeps_what_one_prune_would(
    committed: list[CheckpointInfo], keep: Keep
) -> None:
    """Except for the best: one that was not the best yet may be pruned before a worse end of the run shows it was."""
    keep = replace(keep, every_seconds=None, best=None)
    left: list[CheckpointInfo] = []
    for found in sorted(committed, key=lambda found: found.step):
        left.append(found)
        survivors = set(kept(left, keep))
        left = [survivor for survivor in left if survivor.step in survivors]
    assert {found.step for found in left} == set(kept(committed, keep))


@pytest.mark.parametrize(
    "options",
    [
        {"last": 0},
        {"last": True},
        {"last": 1.5},
        {"every_steps": 0},
        {"every_seconds": 0.0},
        {"every_seconds": math.inf},
        {"best": "loss"},
        {"tags": "good"},
        {"kinds": "final"},
        {"kinds": ("final", "of another program")},
        {"kinds": (["final"],)},
    ],
)
def test_keep_refuses(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionError):
        Keep(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"metric": ""}, {"metric": 5}, {"metric": "x", "mode": "up"}, {"metric": "x", "n": 0}]
)
def test_best_refuses(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionError):
        Best(**options)  # type: ignore[arg-type]


def test_keep_travels_as_json() -> None:
    keep = Keep(last=None, every_steps=10, every_seconds=1.5, best=Best("loss", "max", 2), tags=("a",), kinds=("best",))
    assert msgspec.json.decode(msgspec.json.encode(keep), type=Keep) == keep
