"""Spans, as an exporter of the OpenTelemetry SDK gets them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import asyncckpt as ac
from asyncckpt.telemetry.otel import OtelSpans
from asyncckpt.testing import kill_writer


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    found = TracerProvider()
    found.add_span_processor(SimpleSpanProcessor(exporter))
    yield found
    found.shutdown()


def spans(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == f"asyncckpt.{name}"]


def children(exporter: InMemorySpanExporter, parent: ReadableSpan) -> dict[str, ReadableSpan]:
    below = [span for span in exporter.get_finished_spans() if span.parent == parent.context]
    return {span.name.removeprefix("asyncckpt."): span for span in below}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_save_is_a_span_with_its_parts_one_after_the_other(
    tmp_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.randn(100_000)}, on_event=OtelSpans(provider)) as ckpt:
        tracer = provider.get_tracer("training")
        with tracer.start_as_current_span("step") as training:
            saving = ckpt.save(7, kind="manual")
        saving.result(60)
    (save,) = spans(exporter, "save")
    parts = children(exporter, save)
    assert list(parts) == ["stage", "write", "commit"]
    assert save.parent == training.get_span_context()
    chain = [save.start_time, *(parts[name].end_time for name in parts)]
    assert [parts[name].start_time for name in parts] == chain[:-1]
    assert chain[-1] == save.end_time
    assert chain == sorted(chain, key=lambda moment: moment or 0)
    stats = saving.stats
    assert seconds(save) == pytest.approx(stats.durable_s, abs=1e-6)
    assert seconds(parts["stage"]) == pytest.approx(stats.stage_s, abs=1e-6)
    assert seconds(parts["commit"]) == pytest.approx(stats.commit_s, abs=1e-6)
    assert save.status.status_code is StatusCode.UNSET
    attributes = dict(save.attributes or {})
    assert attributes["asyncckpt.nonce"] == saving.result().nonce
    assert {name: attributes[f"asyncckpt.{name}"] for name in ("step", "outcome", "kind", "raw_bytes")} == {
        "step": 7,
        "outcome": "durable",
        "kind": "manual",
        "raw_bytes": 400_000,
    }
    assert attributes["asyncckpt.stored_bytes"] == stats.stored_bytes


def test_a_failed_save_is_an_error(tmp_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(9)}, on_event=OtelSpans(provider)) as ckpt:
        (tmp_path / ".asyncckpt" / "partial").rmdir()
        (tmp_path / ".asyncckpt" / "partial").write_bytes(b"")
        error = ckpt.save(1).exception(60)
    (save,) = spans(exporter, "save")
    parts = children(exporter, save)
    assert list(parts) == ["stage", "write"]
    for span in (save, parts["write"]):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == str(error)
        assert dict(span.attributes or {})["error.type"] == "storage"
        assert span.end_time == save.end_time
    assert parts["stage"].status.status_code is StatusCode.UNSET


def test_restores_are_spans(tmp_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(9)}, on_event=OtelSpans(provider)) as ckpt:
        ckpt.save(1).result(60)
        ckpt.restore()
        with pytest.raises(ac.CheckpointNotFoundError):
            ckpt.restore(9)
    done, failed = spans(exporter, "restore")
    assert seconds(done) == pytest.approx(ckpt.statistics().restore.last_s, abs=1e-6)
    assert dict(done.attributes or {})["asyncckpt.step"] == 1
    assert done.status.status_code is StatusCode.UNSET
    assert failed.status.status_code is StatusCode.ERROR
    assert dict(failed.attributes or {})["error.type"] == "not_found"


def test_a_writer_that_is_replaced_shows_in_the_saves_it_held(
    tmp_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(9)}, on_event=OtelSpans(provider)) as ckpt:
        ckpt.save(1).result(60)
        os.kill(ckpt.health().writer_pid, signal.SIGSTOP)
        saving = ckpt.save(2)
        saving.wait_staged(60)
        kill_writer(ckpt)
        saving.result(60)
    by_step = {dict(span.attributes or {})["asyncckpt.step"]: span for span in spans(exporter, "save")}
    assert [event.name for event in by_step[1].events] == []
    (restarted,) = by_step[2].events
    assert restarted.name == "writer.restarted"
    assert dict(restarted.attributes or {})["asyncckpt.reason"] == "the writer was killed by signal 9"


def test_without_an_sdk_nothing_happens(tmp_path: Path) -> None:
    assert not isinstance(trace.get_tracer_provider(), TracerProvider)
    spans = OtelSpans()
    with ac.Checkpointer(tmp_path, writer=ac.Writer(kind="thread"), on_event=spans) as ckpt:
        ckpt.save(1, {"x": 1}).result(60)
    assert repr(spans) == "<OtelSpans 0 open>"
