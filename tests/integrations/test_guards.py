"""Guards: checkpoints that hold NaN are marked and passed over; training that changes nothing is noticed."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.cli import ls, show

TIMEOUT_S = 60
CHECKED = ac.Staging(check_finite=True)


@pytest.fixture(params=["process", "thread"])
def writer(request: pytest.FixtureRequest) -> ac.Writer:
    return ac.Writer(kind=request.param)


def save(ckpt: ac.Checkpointer, step: int, **options: Any) -> ac.CheckpointInfo:
    return ckpt.save(step, **options).result(TIMEOUT_S)


def durable(events: list[ac.Event], step: int) -> dict[str, Any]:
    (event,) = [event for event in events if event.name == "save.durable" and event.step == step]
    return dict(event.fields)


# -- not finite ----------------------------------------------------------------------------------

SHAPES = {"in the header": (3,), "in a file": (1000,), "in a shard": (1100, 1000)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_checkpoint_with_nan_or_infinity_is_saved_and_marked(
    tmp_path: Path, shape: tuple[int, ...], bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.ones(shape, dtype=torch.bfloat16)
    events: list[ac.Event] = []
    state = {"weight": weight, "other": torch.ones(2000), "count": torch.arange(9)}
    writer = ac.Writer(kind="thread")
    with ac.Checkpointer(tmp_path, state, staging=CHECKED, writer=writer, on_event=events.append) as ckpt:
        assert save(ckpt, 1).finite is True
        weight.view(-1)[-1] = bad
        with caplog.at_level(logging.WARNING):
            future = ckpt.save(2)
            info = future.result(TIMEOUT_S)
        assert info.finite is future.stats.finite is False
        assert info.warnings == future.stats.warnings == ("weight holds NaN or infinity",)
        assert [found.finite for found in ckpt.checkpoints()] == [True, False]
    assert (durable(events, 1)["finite"], durable(events, 1)["warnings"]) == (True, [])
    assert (durable(events, 2)["finite"], durable(events, 2)["warnings"]) == (False, list(info.warnings))
    assert "step 2: weight holds NaN or infinity" in caplog.text
    assert torch.equal(ac.load(tmp_path, 2)["weight"].nan_to_num(7, 7, 7), weight.nan_to_num(7, 7, 7))


def test_nobody_looks_unless_asked_to(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"weight": torch.full((3,), math.nan)}) as ckpt:
        future = ckpt.save(1)
        info = future.result(TIMEOUT_S)
        assert info.finite is ckpt.checkpoints()[0].finite is future.stats.finite is None
        assert ckpt.restore(finite=True) is not None
    assert b'"finite"' not in (tmp_path / "step-00000001" / "zarr.json").read_bytes()


def test_the_warning_counts_the_tensors(tmp_path: Path) -> None:
    state = {name: torch.full((200,), math.nan) for name in ("a b", "u\ud800", "v")}
    with ac.Checkpointer(tmp_path, state, staging=CHECKED) as ckpt:
        assert save(ckpt, 1).warnings == ("a b and 2 other tensors hold NaN or infinity",)
        del state["v"]
        assert save(ckpt, 2).warnings == ("a b and 1 other tensor hold NaN or infinity",)
        del state["a b"]
        assert save(ckpt, 3).warnings == ("u%ED%A0%80 holds NaN or infinity",)


def test_a_step_that_was_linked_from_the_one_before_is_marked_as_well(tmp_path: Path) -> None:
    state = {"weight": torch.full((300_000,), math.nan)}
    with ac.Checkpointer(tmp_path, state, staging=CHECKED) as ckpt:
        save(ckpt, 1)
        future = ckpt.save(2)
        assert future.result(TIMEOUT_S).finite is False
        assert future.stats.linked_bytes > 0


def test_a_streamed_snapshot_is_searched_in_every_part(tmp_path: Path) -> None:
    state = {f"t{index}": torch.ones(1000) for index in range(8)}
    state["t7"][0] = math.nan
    staging = ac.Staging(check_finite=True, memory_limit=12_000)
    with ac.Checkpointer(tmp_path, state, staging=staging) as ckpt:
        assert save(ckpt, 1).warnings == ("t7 holds NaN or infinity",)


def diverge(root: Path) -> dict[str, torch.Tensor]:
    """Steps 1 and 2 are finite, 3 and 4 are not; 3 has the best metric."""
    state = {"w": torch.zeros(300)}
    keep = ac.Keep(last=None, best=ac.Best("loss"))
    with ac.Checkpointer(root, state, staging=CHECKED, keep=keep) as ckpt:
        for step, (value, loss) in enumerate([(1.0, 0.5), (2.0, 0.6), (math.nan, 0.1), (math.inf, 0.2)], start=1):
            state["w"].fill_(value)
            save(ckpt, step, metrics={"loss": loss})
        best = ckpt.best
        assert best is not None
        assert best.step == 1
    return state


def test_the_newest_finite_one_is_restored_when_asked_for(tmp_path: Path) -> None:
    state = diverge(tmp_path)
    with ac.Checkpointer(tmp_path, state, keep=ac.Keep(last=None, best=ac.Best("loss"))) as ckpt:
        found = ckpt.restore()
        assert found is not None
        assert found.step == 4
        with pytest.warns(RuntimeWarning, match=r"step [34] is not finite and was set aside") as warned:
            found = ckpt.restore(finite=True)
        assert len(warned) == 2
        assert found is not None
        assert (found.step, found.fell_back_from) == (2, (4, 3))
        assert torch.equal(state["w"], torch.full((300,), 2.0))
        for step in (3, 4):  # training goes on and reaches them again
            save(ckpt, step)
    assert len(list((tmp_path / ".asyncckpt" / "damaged").iterdir())) == 2


def test_a_step_or_tag_that_is_not_finite_is_refused_when_asked_for_finite_ones(tmp_path: Path) -> None:
    state = diverge(tmp_path)
    with ac.Checkpointer(tmp_path, state, keep=ac.Keep(last=None, best=ac.Best("loss"))) as ckpt:
        state["w"].fill_(9.0)
        with pytest.raises(ac.NonFiniteError, match="step 3 holds NaN or infinity"):
            ckpt.restore(3, finite=True)
        assert state["w"][0] == 9
        found = ckpt.restore("best", finite=True)
        assert found is not None
        assert found.step == 1
        assert ckpt.restore(3) is not None


def test_without_any_finite_one_it_says_so(tmp_path: Path) -> None:
    state = {"w": torch.full((3,), math.nan)}
    with ac.Checkpointer(tmp_path, state, staging=CHECKED) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
        with pytest.raises(ac.NonFiniteError, match=r"every checkpoint in .* holds NaN or infinity"):
            ckpt.restore(finite=True)
        assert [info.step for info in ckpt.checkpoints()] == [1, 2], "nothing was set aside"


def test_retention_does_not_count_it_among_the_best(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3)}
    keep = ac.Keep(last=1, best=ac.Best("loss"))
    with ac.Checkpointer(tmp_path, state, staging=CHECKED, keep=keep) as ckpt:
        for step, (value, loss) in enumerate([(1.0, 0.5), (math.nan, 0.1), (2.0, 0.6)], start=1):
            state["w"].fill_(value)
            save(ckpt, step, metrics={"loss": loss})
    assert [info.step for info in ac.open(tmp_path).checkpoints()] == [1, 3]


def test_the_command_line_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverge(tmp_path)
    assert ls.run(str(tmp_path), as_json=False) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [("NO" in row, "yes" in row) for row in rows[1:]] == [(True, False)] * 2 + [(False, True)] * 2
    assert show.run(str(tmp_path), "3", (), as_json=False) == 0
    assert "NO: it holds NaN or infinity" in capsys.readouterr().out


# -- nothing learnt ------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make(width: int = 64) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


WARNING = "no tensor that requires gradients has changed since step"


@pytest.mark.parametrize("width", [2, 400], ids=["in the header", "in files"])
def test_training_a_copy_of_what_is_saved_is_noticed(
    tmp_path: Path, width: int, writer: ac.Writer, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = make(width)
    trained = copy.deepcopy(model)  # the mistake
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    events: list[ac.Event] = []
    with ac.Checkpointer(tmp_path, {"model": model, "epoch": 0}, writer=writer, on_event=events.append) as ckpt:
        for step in (1, 2):
            train(trained, optimizer)
            with caplog.at_level(logging.WARNING):
                future = ckpt.save(step)
                info = future.result(TIMEOUT_S)
            assert future.stats.stale is (step == 2)
        assert [text.startswith(f"{WARNING} 1;") for text in info.warnings] == [True]
    assert [durable(events, step)["stale"] for step in (1, 2)] == [False, True]
    assert f"step 2: {WARNING} 1" in caplog.text
    assert "step 1:" not in caplog.text


@pytest.mark.parametrize("incremental", [True, False])
def test_training_what_is_saved_is_no_reason_to_warn(tmp_path: Path, incremental: bool) -> None:
    model, optimizer = make()
    model[0].requires_grad_(False)  # frozen parameters never change
    with ac.Checkpointer(tmp_path, {"model": model}, writer=ac.Writer(incremental=incremental)) as ckpt:
        for step in range(3):
            train(model, optimizer)
            assert save(ckpt, step).warnings == ()


def test_what_is_frozen_does_not_count_and_what_is_trained_does(tmp_path: Path) -> None:
    model, optimizer = make()
    with ac.Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        model.requires_grad_(False)
        assert [save(ckpt, step).warnings for step in (1, 2)] == [(), ()], "nothing is trained"
        model.requires_grad_(True)
        assert save(ckpt, 3).warnings == (), "it was not trained at the save before"
        assert len(save(ckpt, 4).warnings) == 1
        with torch.no_grad():
            model[1].bias[0] += 1
        assert save(ckpt, 5).warnings == ()


@pytest.mark.parametrize("kind", ["emergency", "manual", "final"])
def test_saves_that_training_is_not_the_reason_for_are_not_judged(tmp_path: Path, kind: str) -> None:
    model, optimizer = make()
    with ac.Checkpointer(tmp_path, {"model": model}) as ckpt:
        train(model, optimizer)
        save(ckpt, 1)
        assert save(ckpt, 2, kind=kind).warnings == ()
        assert len(save(ckpt, 3).warnings) == 1


def test_another_run_and_another_save_of_the_step_are_not_compared(tmp_path: Path) -> None:
    model, _ = make()
    for step in (1, 2):
        with ac.Checkpointer(tmp_path, {"model": model}) as ckpt:
            assert save(ckpt, step).warnings == ()
            ckpt.delete(step)
            assert save(ckpt, step).warnings == ()


def test_leaf_tensors_count_as_parameters_and_results_do_not(tmp_path: Path) -> None:
    leaf = torch.zeros(300, requires_grad=True)
    state = {"leaf": leaf, "result": (leaf * 2)}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        assert [len(save(ckpt, step).warnings) for step in (1, 2)] == [0, 1]
        state["result"] = torch.ones(300)
        assert len(save(ckpt, 3).warnings) == 1
        del state["leaf"]
        assert [len(save(ckpt, step).warnings) for step in (4, 5)] == [0, 0]


def test_a_streamed_snapshot_is_compared_as_a_whole(tmp_path: Path) -> None:
    state = {f"t{index}": torch.ones(1000, requires_grad=True) for index in range(8)}
    with ac.Checkpointer(tmp_path, state, staging=ac.Staging(memory_limit=12_000)) as ckpt:
        save(ckpt, 1)
        with torch.no_grad():
            state["t7"] += 1
        assert save(ckpt, 2).warnings == ()
        assert len(save(ckpt, 3).warnings) == 1
