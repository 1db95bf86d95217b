"""Carrying out a retention plan; the plan itself is tested in ``tests/unit``."""

from __future__ import annotations

import errno
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from asyncckpt.errors import StorageError
from asyncckpt.policies import Keep
from asyncckpt.repository import Catalog, CommittedStep, Decision, RetentionPlan, execute_retention, plan_retention
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]


def test_the_plan_is_carried_out(store: LocalStore, commit_step: CommitStep) -> None:
    for step in (1, 2, 3, 4):
        commit_step(step, tags=["good"] if step == 2 else [])
    infos = [committed.info for committed in Catalog(store).committed()]
    plan = plan_retention(infos, Keep(last=1), datetime.now(UTC))
    assert execute_retention(store, plan) == [1, 3]
    assert Catalog(store).steps() == [2, 4]


def test_a_step_that_is_gone_is_no_error(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(1)
    plan = RetentionPlan(remove=(Decision(2, "test"), Decision(1, "test")))
    assert execute_retention(store, plan) == [1]


def test_a_failure_does_not_stop_the_others_and_is_raised(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        commit_step(step)
    real = store.delete

    def fail(key: str) -> None:
        if key.startswith("step-00000001"):
            raise StorageError("stuck", errno=errno.EBUSY)
        real(key)

    monkeypatch.setattr(store, "delete", fail)
    with pytest.raises(StorageError, match="stuck"):
        execute_retention(store, RetentionPlan(remove=(Decision(2, "test"), Decision(1, "test"))))
    assert Catalog(store).steps() == [1, 3]
