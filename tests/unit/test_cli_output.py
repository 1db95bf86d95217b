"""Formatting of what the command line prints."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from asyncckpt.cli.output import (
    Column,
    format_bytes,
    format_metrics,
    format_ratio,
    format_time,
    json_value,
    print_json,
    print_table,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_493_277_696, "1.49 GB"),
        (154_389_504, "154 MB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_ratio_of_nothing_stored_is_a_dash() -> None:
    assert format_ratio(131, 100) == "1.31x"
    assert format_ratio(0, 0) == "-"


def test_times_are_utc() -> None:
    east = datetime(2026, 2, 1, 1, 30, 5, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert format_time(east) == "2026-01-31 23:30:05Z"
    assert format_time(east.astimezone(UTC)) == "2026-01-31 23:30:05Z"


def test_metrics_that_are_not_finite_are_shown() -> None:
    assert format_metrics({"loss": 3.21891, "val": math.nan}) == "loss=3.2189, val=nan"


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"nan": math.nan, "inf": [math.inf, -math.inf], "tuple": (1, True, None), "time": datetime(2026, 1, 1)})
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document == {"nan": "nan", "inf": ["inf", "-inf"], "tuple": [1, True, None], "time": "2026-01-01 00:00:00"}


def test_json_keys_are_strings() -> None:
    assert json_value({1: {(2, 3): 4.5}}) == {"1": {"(2, 3)": 4.5}}


def test_tables_off_a_terminal_are_aligned_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    print_table([Column("name"), Column("size", right=True)], [("a", "1 B"), (long, "12.3 kB")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name".ljust(300) + "     size", "a".ljust(300) + "      1 B", f"{long}  12.3 kB"]


def test_an_empty_table_has_its_titles(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Column("step", right=True), Column("kind")], [])
    assert capsys.readouterr().out == "step  kind\n"


def test_tables_on_a_terminal_take_brackets_literally(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asyncckpt.cli.output.is_terminal", lambda: True)
    print_table([Column("shape")], [("[bold]",), ("[3, 4]",)])
    out = capsys.readouterr().out
    assert "[bold]" in out
    assert "[3, 4]" in out
