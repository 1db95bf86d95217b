"""The lines in the log, to the letter."""

from __future__ import annotations

from typing import Any

import pytest

from asyncckpt.events import Event
from asyncckpt.telemetry.log_lines import log_line
from asyncckpt.telemetry.units import format_bytes, format_rate, format_ratio, format_seconds


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        (
            "save.staged",
            {"raw_bytes": 1_876_000_000, "stage_s": 0.0412, "blocked_s": 0.0118},
            "step 500 staged 1.9 GB in 41 ms, blocked 12 ms",
        ),
        (
            "save.durable",
            {"raw_bytes": 1_876_000_000, "stored_bytes": 1_432_000_000, "durable_s": 2.3104},
            "step 500 durable in 2.31 s, 812 MB/s, 1.31x",
        ),
        (
            "save.durable",
            {"raw_bytes": 0, "stored_bytes": 0, "durable_s": 0.0},
            "step 500 durable in 0.0 ms, - B/s, -x",
        ),
        ("save.skipped", {}, "step 500 skipped, not saved"),
        ("save.superseded", {}, "step 500 superseded, not saved"),
        ("save.cancelled", {}, "step 500 cancelled, not saved"),
        ("restore.done", {"raw_bytes": 10**9, "restore_s": 12.34}, "step 500 restored, 1.0 GB in 12.3 s"),
        ("checkpoint.pruned", {"reason": "older than the last 3"}, "step 500 pruned: older than the last 3"),
        ("checkpoint.deleted", {}, "step 500 deleted"),
        ("save.started", {}, None),
        ("some.other", {}, None),
    ],
)
def test_lines(name: str, fields: dict[str, Any], line: str | None) -> None:
    assert log_line(Event(name, 500, fields=fields)) == line


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_949, "9.9 kB"), (9_960, "10 kB"), (999_400, "999 kB")],
        *[(999_600, "1.0 MB"), (812_400_000, "812 MB"), (1.9e9, "1.9 GB"), (4e12, "4.0 TB"), (7e15, "7.0 PB")],
        (8e18, "8000 PB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.0, "0.0 ms"), (0.00042, "0.4 ms"), (0.00994, "9.9 ms"), (0.00996, "10 ms"), (0.0412, "41 ms")],
        *[(0.9994, "999 ms"), (0.9996, "1.00 s"), (2.3104, "2.31 s"), (9.996, "10.0 s"), (754.2, "754.2 s")],
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rates_and_ratios() -> None:
    assert format_rate(2e9, 2.0) == "1.0 GB/s"
    assert format_ratio(300, 200) == "1.50x"
