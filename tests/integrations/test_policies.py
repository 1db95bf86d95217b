"""When a checkpointer saves, as what, and with which metrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.model import KINDS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def open_root(root: Path, when: ac.When | None = None, keep: ac.Keep | None = None) -> ac.Checkpointer:
    state = {"weight": torch.zeros(300)}
    return ac.Checkpointer(root, state, when=when, keep=keep, writer=ac.Writer(kind="thread"))


@pytest.fixture
def ckpt(root: Path) -> Iterator[ac.Checkpointer]:
    when = ac.Every(steps=10) | ac.Validation(best=ac.Best("val_loss"))
    with open_root(root, when, ac.Keep(last=None)) as opened:
        yield opened


def found(ckpt: ac.Checkpointer) -> dict[int, tuple[str, dict[str, float]]]:
    ckpt.wait()
    return {info.step: (info.kind, dict(info.metrics)) for info in ckpt.checkpoints()}


def test_a_validated_step_is_saved_as_best_and_step_does_not_save_it_again(ckpt: ac.Checkpointer) -> None:
    saving = ckpt.validated(10, {"val_loss": 2.0})
    assert saving is not None
    assert saving.result(60).kind == "best"
    assert ckpt.step(10, metrics={"loss": 1.0}) is None
    assert ckpt.validated(11, {"val_loss": 3.0}) is None
    assert found(ckpt) == {10: ("best", {"val_loss": 2.0})}


def test_a_validation_that_saves_nothing_is_merged_into_the_save_of_its_step(ckpt: ac.Checkpointer) -> None:
    ckpt.save(1, metrics={"val_loss": 1.0})
    assert ckpt.validated(10, {"val_loss": 2.0, "loss": 0.0}) is None
    assert ckpt.step(10, metrics={"loss": 1.0}) is not None
    assert ckpt.validated(12, {"val_loss": 2.5}) is None
    ckpt.save(12, kind="manual")
    assert ckpt.step(20) is not None
    assert found(ckpt) == {
        1: ("regular", {"val_loss": 1.0}),
        10: ("regular", {"val_loss": 2.0, "loss": 1.0}),
        12: ("manual", {"val_loss": 2.5}),
        20: ("regular", {}),
    }


def test_a_validation_after_the_save_of_its_step_warns(ckpt: ac.Checkpointer) -> None:
    assert ckpt.step(10) is not None
    with pytest.warns(RuntimeWarning, match=r"step 10 was saved before validated\(10"):
        assert ckpt.validated(10, {"val_loss": 2.0}) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ckpt.step(11) is None
        assert ckpt.validated(11, {"val_loss": 2.0}) is not None, "step 11 was not saved before"
    assert found(ckpt) == {10: ("regular", {}), 11: ("best", {"val_loss": 2.0})}


def test_best_compares_with_what_an_earlier_run_left(root: Path) -> None:
    when = ac.Validation() | ac.Validation(best=ac.Best("val_loss"))
    with open_root(root, when) as ckpt:
        assert ckpt.validated(1, {"val_loss": 2.0}) is not None
    with open_root(root, when, ac.Keep(last=None)) as ckpt:
        ckpt.restore()
        for step, loss in ((2, 3.0), (3, float("nan")), (4, 1.0)):
            assert ckpt.validated(step, {"val_loss": loss}) is not None
    kinds = {info.step: info.kind for info in ac.open(root).checkpoints()}
    assert kinds == {1: "best", 2: "validation", 3: "validation", 4: "best"}


def test_what_retention_removed_is_no_rival(root: Path) -> None:
    with open_root(root, ac.Validation(best=ac.Best("val_loss")), ac.Keep(last=1)) as ckpt:
        ckpt.save(1, metrics={"val_loss": 1.0}).result(60)
        ckpt.save(2, metrics={"val_loss": 3.0}).result(60)
    with open_root(root, ac.Validation(best=ac.Best("val_loss")), ac.Keep(last=1)) as ckpt:
        assert ckpt.validated(3, {"val_loss": 2.0}) is not None


def test_a_deleted_checkpoint_is_no_rival(ckpt: ac.Checkpointer) -> None:
    ckpt.save(1, metrics={"val_loss": 1.0}).result(60)
    assert ckpt.validated(2, {"val_loss": 2.0}) is None
    ckpt.delete(1)
    assert ckpt.validated(3, {"val_loss": 2.0}) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_saved(root: Path, kind: str) -> None:
    with open_root(root) as ckpt:
        assert ckpt.save(1, kind=kind).result(60).kind == kind
    assert ac.open(root).checkpoints()[0].kind == kind


@pytest.mark.parametrize("kind", ["", "Regular", "every", None, 5, ["final"]])
def test_other_kinds_are_refused(root: Path, kind: object) -> None:
    with open_root(root) as ckpt:
        with pytest.raises(ac.InvalidOptionError, match="kind must be one of 'regular', "):
            ckpt.save(1, kind=kind)  # type: ignore[arg-type]
        ckpt.save(1)


def test_what_was_asked_for_by_name_stays(root: Path) -> None:
    with open_root(root, keep=ac.Keep(last=1)) as ckpt:
        for step, kind in enumerate(KINDS):
            ckpt.save(step, kind=kind).result(60)
        ckpt.save(9).result(60)
    assert [info.kind for info in ac.open(root).checkpoints()] == ["manual", "final", "regular"]


def test_statistics_explain_an_adaptive_policy(root: Path) -> None:
    with open_root(root, ac.Every(steps=2) | ac.Adaptive(shortest_s=3600.0)) as ckpt:
        before = ckpt.statistics().policy
        assert before is not None
        assert (before.interval_s, before.overhead) == (3600.0, 0.0)
        for step in range(1, 8):
            if (saving := ckpt.step(step)) is not None:
                saving.result(60)
        report = ckpt.statistics().policy
        assert report is not None
        assert report.reason == "the lower bound shortest_s"
        assert report.cost_s > 0.0
        assert report.overhead == report.cost_s / 3600.0
        assert report.durable_s > 0.0
    with open_root(root, ac.Every(steps=2)) as ckpt:
        assert ckpt.statistics().policy is None


def test_validated_checks_what_it_is_given(ckpt: ac.Checkpointer) -> None:
    with pytest.raises(ac.InvalidOptionError):
        ckpt.validated(-1, {"val_loss": 1.0})
    with pytest.raises(ac.InvalidOptionError):
        ckpt.validated(1, {"val_loss": "low"})  # type: ignore[dict-item]
    ckpt.close()
    with pytest.raises(ac.ClosedError):
        ckpt.validated(1, {"val_loss": 1.0})
