"""What a run tells about itself: events, log lines, statistics."""

from __future__ import annotations

import ast
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

import asyncckpt as ac
from asyncckpt.events import CATALOGUE
from asyncckpt.telemetry.prometheus import PrometheusExporter
from asyncckpt.testing import kill_writer
from tests.integrations.hand_overs import hand_overs_held

TIMEOUT_S = 60


@pytest.fixture(params=["process", "thread"])
def writer(request: pytest.FixtureRequest) -> ac.Writer:
    return ac.Writer(kind=request.param)


@pytest.fixture
def told() -> Iterator[list[ac.Event]]:
    """Collects events; in the end each must be as the catalogue has it, and survive JSON."""
    events: list[ac.Event] = []
    yield events
    assert events
    for event in events:
        assert set(event.fields) == set(CATALOGUE[event.name].fields), event
        assert json.loads(json.dumps(dict(event.fields))) == event.fields


def of_step(told: list[ac.Event], step: int) -> list[str]:
    return [event.name for event in told if event.step == step and event.name.startswith("save.")]


def fields_of(told: list[ac.Event], name: str, step: int | None = None) -> Any:
    (event,) = (event for event in told if event.name == name and event.step == step)
    return event.fields


def test_a_run_tells_its_story(tmp_path: Path, writer: ac.Writer, told: list[ac.Event]) -> None:
    state, pruned = {"w": torch.randn(100_000)}, threading.Event()

    def listen(event: ac.Event) -> None:
        told.append(event)
        if event.name == "checkpoint.pruned":
            pruned.set()

    with ac.Checkpointer(tmp_path, state, keep=ac.Keep(last=2), writer=writer, on_event=listen) as ckpt:
        assert ckpt.restore() is None
        for step in (1, 2, 3):
            saving = ckpt.save(step, kind="emergency")
            saving.result(TIMEOUT_S)
        assert pruned.wait(TIMEOUT_S)
        ckpt.restore(2)
        ckpt.delete(2)
    assert [told[0].name, told[-1].name] == ["checkpointer.opened", "checkpointer.closed"]
    for step in (1, 2, 3):
        assert of_step(told, step) == ["save.started", "save.staged", "save.durable"]
        assert len({event.fields["nonce"] for event in told if event.step == step and "nonce" in event.fields}) == 1
    durable = fields_of(told, "save.durable", 3)
    assert {name: durable[name] for name in ("durable_s", "stored_bytes", "commit_s", "blocked_s")} == {
        name: getattr(saving.stats, name) for name in ("durable_s", "stored_bytes", "commit_s", "blocked_s")
    }
    assert (durable["kind"], durable["raw_bytes"], Path(durable["path"])) == (
        "emergency",
        400_000,
        tmp_path / "step-00000003",
    )
    assert fields_of(told, "checkpoint.pruned", 1)["reason"].startswith("no rule keeps it")
    assert fields_of(told, "restore.done", 2)["raw_bytes"] == 400_000
    assert fields_of(told, "checkpoint.deleted", 2) == {}


def test_the_log_has_a_line_for_staged_and_one_for_durable(
    tmp_path: Path, writer: ac.Writer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="asyncckpt"), ac.Checkpointer(tmp_path, writer=writer) as ckpt:
        ckpt.save(500, {"w": torch.zeros(500_000)}).result(TIMEOUT_S)
    lines = [record.getMessage() for record in caplog.records if record.name == "asyncckpt"]
    number = r"\d+(\.\d+)?"
    assert len(lines) == 2
    assert re.fullmatch(rf"step 500 staged 2\.0 MB in {number} m?s, blocked {number} m?s", lines[0])
    assert re.fullmatch(rf"step 500 durable in {number} m?s, {number} [kMG]?B/s, {number}x", lines[1])


def test_saves_that_end_otherwise_say_so(tmp_path: Path, told: list[ac.Event]) -> None:
    with ac.Checkpointer(
        tmp_path, {"w": torch.ones(1000)}, staging=ac.Staging(when_busy="skip"), on_event=told.append
    ) as ckpt:
        with hand_overs_held(ckpt):
            first = ckpt.save(1)
            assert ckpt.save(2).outcome == "skipped"
            assert first.cancel()
        (tmp_path / ".asyncckpt" / "partial").rmdir()
        (tmp_path / ".asyncckpt" / "partial").write_bytes(b"")
        assert ckpt.save(3).exception(TIMEOUT_S) is not None
        with pytest.raises(ac.UnsupportedStateError):
            ckpt.save(4, {"x": object()})
        statistics = ckpt.statistics()
    assert of_step(told, 1) == ["save.started", "save.cancelled"]
    assert of_step(told, 2) == ["save.started", "save.skipped"]
    assert of_step(told, 3) == ["save.started", "save.staged", "save.failed"]
    assert of_step(told, 4) == []
    failed = fields_of(told, "save.failed", 3)
    assert failed["error"] == "storage"
    assert failed["message"]
    assert failed["elapsed_s"] > 0
    ends = (statistics.num_cancelled, statistics.num_skipped, statistics.num_failed, statistics.num_durable)
    assert (statistics.num_saves, ends) == (3, (1, 1, 1, 0))


def test_a_killed_writer_is_told_of(tmp_path: Path, told: list[ac.Event]) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(1000)}, on_event=told.append) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        killed = kill_writer(ckpt)
        ckpt.save(2).result(TIMEOUT_S)
        assert fields_of(told, "checkpointer.opened")["writer_pid"] == killed
        assert fields_of(told, "writer.restarted") == {
            "reason": "the writer was killed by signal 9",
            "writer_pid": ckpt.health().writer_pid,
        }
        assert ckpt.statistics().num_writer_restarts == 1


def test_a_writer_that_is_gone_for_good_is_told_of(tmp_path: Path, told: list[ac.Event]) -> None:
    options = ac.Writer(restarts=0, on_error="warn")
    with ac.Checkpointer(tmp_path, {"w": torch.ones(1000)}, writer=options, on_event=told.append) as ckpt:
        kill_writer(ckpt)
        assert isinstance(ckpt.save(1).exception(TIMEOUT_S), ac.WriterDiedError)
    assert fields_of(told, "writer.failed")["error"] == "writer_died"
    assert fields_of(told, "save.failed", 1)["error"] == "writer_died"


def test_restores_are_counted_with_what_they_fell_back_from(tmp_path: Path, told: list[ac.Event]) -> None:
    state = {"w": torch.ones(1000)}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        for step in (1, 2):
            ckpt.save(step).result(TIMEOUT_S)
    (tmp_path / "step-00000002" / "state" / "w" / "c.0").unlink()
    with ac.Checkpointer(tmp_path, state, on_event=told.append) as ckpt:
        with pytest.warns(RuntimeWarning, match="step 2 is damaged"):
            assert ckpt.restore() is not None
        with pytest.raises(ac.CheckpointNotFoundError):
            ckpt.restore(9)
        statistics = ckpt.statistics()
    assert fields_of(told, "restore.done", 1)["fell_back_from"] == [2]
    assert fields_of(told, "restore.failed")["error"] == "not_found"
    assert (statistics.num_restores, statistics.num_fallbacks) == (1, 1)
    assert statistics.restore.count == 1
    assert statistics.restore.last_s == fields_of(told, "restore.done", 1)["restore_s"] > 0


def test_statistics_add_up(tmp_path: Path, writer: ac.Writer) -> None:
    with ac.Checkpointer(tmp_path, writer=writer, keep=ac.Keep(last=1)) as ckpt:
        savings = [ckpt.save(step, {"w": torch.randn(50_000 * step)}) for step in (1, 2, 3)]
        ckpt.wait(TIMEOUT_S)
        found = ckpt.statistics()
    every = [saving.stats for saving in savings]
    assert (found.num_saves, found.num_durable, found.num_failed) == (3, 3, 0)
    assert found.raw_bytes == sum(stats.raw_bytes for stats in every) == 6 * 200_000
    assert found.stored_bytes == sum(stats.stored_bytes for stats in every)
    for name in ("blocked", "stage", "durable"):
        seconds = [getattr(stats, f"{name}_s") for stats in every]
        total = getattr(found, name)
        assert (total.count, total.min_s, total.max_s, total.last_s) == (3, min(seconds), max(seconds), seconds[-1])
        assert total.mean_s == pytest.approx(sum(seconds) / 3)
    assert found.blocked_s == found.blocked.total_s > 0
    assert (found.last, found.last_step) == (every[-1], 3)
    assert ac.Statistics().durable.mean_s == 0.0


def test_several_callbacks_and_one_that_fails(
    tmp_path: Path, writer: ac.Writer, caplog: pytest.LogCaptureFixture
) -> None:
    path, told = tmp_path / "events.jsonl", []

    def fail(event: ac.Event) -> None:
        raise SystemExit(3)

    run = tmp_path / "run"
    with ac.Checkpointer(run, writer=writer, on_event=[fail, ac.JsonLines(path), told.append]) as ckpt:
        ckpt.save(1, {"w": torch.ones(3)}).result(TIMEOUT_S)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in written] == [event.name for event in told]
    assert [line["event"] for line in written][1:4] == ["save.started", "save.staged", "save.durable"]
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failures) == len(told)


@pytest.mark.parametrize("on_event", [3, "events.jsonl", [print, None]])
def test_what_cannot_be_called_is_refused(tmp_path: Path, on_event: Any) -> None:
    with pytest.raises(ac.InvalidOptionError, match="on_event"):
        ac.Checkpointer(tmp_path / "run", on_event=on_event)
    assert not (tmp_path / "run").exists()


def test_every_event_the_package_emits_is_in_the_catalogue() -> None:
    emitted = set()
    for path in Path(ac.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "emit":
                argument = node.args[0]
                if isinstance(argument, ast.Constant):
                    emitted.add(argument.value)
    assert len(emitted) >= 8
    assert emitted <= set(CATALOGUE)


def test_the_documentation_lists_every_event_and_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
    sections = dict(re.findall(r"^### `([a-z._]+)`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(CATALOGUE)
    for name, kind in CATALOGUE.items():
        assert kind.when in sections[name]
        assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", sections[name], re.MULTILINE)) == dict(kind.fields)


def test_the_documentation_lists_every_metric() -> None:
    text = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
    listed = set(re.findall(r"^\| `(asyncckpt_\w+)", text, re.MULTILINE))
    registry = CollectorRegistry()
    PrometheusExporter(registry)
    families = {family.name + "_total" * (family.type == "counter") for family in registry.collect()}
    assert listed == families
