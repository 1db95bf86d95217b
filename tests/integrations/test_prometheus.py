"""The Prometheus page, scraped over HTTP and parsed."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import asyncckpt as ac
from asyncckpt.telemetry.prometheus import PrometheusExporter
from tests.integrations.hand_overs import hand_overs_held

Page = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int | None) -> tuple[dict[str, str], Page]:
    """Types of the metric families, and every sample."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    types = {family.name: family.type for family in families}
    samples = [sample for family in families for sample in family.samples]
    return types, {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def value(page: Page, name: str, **labels: str) -> float:
    return page[f"asyncckpt_{name}", tuple(sorted(labels.items()))]


@pytest.fixture
def exporter() -> Any:
    found = PrometheusExporter(CollectorRegistry(), port=0, address="127.0.0.1")
    yield found
    found.close()


def test_a_scrape_agrees_with_the_statistics(tmp_path: Path, exporter: PrometheusExporter) -> None:
    state = {"w": torch.randn(100_000)}
    with ac.Checkpointer(tmp_path, state, keep=ac.Keep(last=1), on_event=exporter) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).result(60)
        ckpt.restore()
        with pytest.raises(ac.CheckpointNotFoundError):
            ckpt.restore(77)
    found = ckpt.statistics()
    types, page = scrape(exporter.port)
    assert value(page, "saves_total", outcome="durable") == 3
    assert value(page, "saves_total", outcome="failed") == 0
    assert value(page, "saves_pending") == 0
    for name, durations in [("blocked", found.blocked), ("stage", found.stage), ("durable", found.durable)]:
        assert value(page, f"save_{name}_seconds_count") == 3
        assert value(page, f"save_{name}_seconds_sum") == pytest.approx(durations.total_s)
        assert value(page, f"save_{name}_seconds_bucket", le="+Inf") == 3
        assert types[f"asyncckpt_save_{name}_seconds"] == "histogram"
    assert value(page, "save_raw_bytes_total") == found.raw_bytes == 1_200_000
    assert value(page, "save_stored_bytes_total") == found.stored_bytes
    assert value(page, "save_linked_bytes_total") == found.linked_bytes
    assert value(page, "last_durable_step") == 3
    assert value(page, "last_durable_timestamp_seconds") > 1.7e9
    assert value(page, "last_compression_ratio") == pytest.approx(400_000 / ckpt.statistics().last.stored_bytes)  # type: ignore[union-attr]
    assert value(page, "checkpoints_pruned_total") == 2
    assert value(page, "restores_total", result="done") == 1
    assert value(page, "restores_total", result="failed") == 1
    assert value(page, "restore_seconds_count") == 1


def test_saves_that_end_otherwise_are_counted(tmp_path: Path, exporter: PrometheusExporter) -> None:
    staging = ac.Staging(when_busy="skip")
    with ac.Checkpointer(tmp_path, {"w": torch.ones(9)}, staging=staging, on_event=exporter) as ckpt:
        with hand_overs_held(ckpt):
            first = ckpt.save(1)
            ckpt.save(2)
            assert value(scrape(exporter.port)[1], "saves_pending") == 1
            first.cancel()
        (tmp_path / ".asyncckpt" / "partial").rmdir()
        (tmp_path / ".asyncckpt" / "partial").write_bytes(b"")
        assert ckpt.save(3).exception(60) is not None
    page = scrape(exporter.port)[1]
    assert value(page, "saves_total", outcome="skipped") == 1
    assert value(page, "saves_total", outcome="cancelled") == 1
    assert value(page, "saves_total", outcome="failed") == value(page, "save_failures_total", code="storage") == 1
    assert value(page, "saves_pending") == 0


def test_every_metric_has_a_help_text_and_a_conventional_name(exporter: PrometheusExporter) -> None:
    types, page = scrape(exporter.port)
    ours = {name: kind for name, kind in types.items() if not name.endswith("_created")}
    assert len(ours) == 18
    for name, kind in ours.items():
        assert name.startswith("asyncckpt_")
        assert kind in {"counter", "gauge", "histogram"}
        if kind == "histogram":
            assert name.endswith("_seconds")
    counters = {name for name, _ in page if name.removesuffix("_total") in ours}
    assert all(name.endswith("_total") for name in counters if ours[name.removesuffix("_total")] == "counter")


def test_two_checkpointers_may_share_an_exporter_but_two_exporters_no_registry(
    tmp_path: Path, exporter: PrometheusExporter
) -> None:
    for name in ("a", "b"):
        with ac.Checkpointer(tmp_path / name, writer=ac.Writer(kind="thread"), on_event=exporter) as ckpt:
            ckpt.save(1, {"x": 1}).result(60)
    assert value(scrape(exporter.port)[1], "saves_total", outcome="durable") == 2
    registry = CollectorRegistry()
    first = PrometheusExporter(registry)
    with pytest.raises(ac.InvalidOptionError, match="share it"):
        PrometheusExporter(registry)
    first.close()
    PrometheusExporter(registry)


def test_a_port_that_is_taken_is_told_and_leaves_the_registry_clean() -> None:
    registry = CollectorRegistry()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ac.InvalidOptionError, match="cannot be served"):
            PrometheusExporter(registry, port=taken.getsockname()[1], address="127.0.0.1")
    PrometheusExporter(registry).close()


def test_close_frees_the_port(exporter: PrometheusExporter) -> None:
    port = exporter.port
    assert port is not None
    exporter.close()
    exporter.close()
    assert exporter.port is None
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [("prometheus", "prometheus_client", "metrics"), ("otel", "opentelemetry", "otel")],
)
def test_without_the_extra_the_import_names_it(module: str, missing: str, extra: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; import asyncckpt.telemetry.{module}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("ImportError: ")
    assert f"pip install 'asyncckpt[{extra}]'" in ended.stderr.splitlines()[-1]
