"""How results are printed: tables for people, JSON for programs.

Off a terminal nothing is wrapped, cut or coloured, and rich is not even imported: `grep` and `awk` see whole lines.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "Column",
    "format_bytes",
    "format_metrics",
    "format_ratio",
    "format_time",
    "is_terminal",
    "json_value",
    "print_json",
    "print_table",
    "printable",
]

_MAX_INT_BITS = 4096


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def printable(text: str) -> str:
    """*text* with control characters and lone surrogates escaped: a checkpoint must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def format_bytes(count: int) -> str:
    """*count* with a decimal unit and three digits: ``1.49 GB``."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def format_ratio(raw_bytes: int, stored_bytes: int) -> str:
    """How many times smaller the stored bytes are: ``1.31x``."""
    return f"{raw_bytes / stored_bytes:.2f}x" if stored_bytes else "-"


def format_time(when: datetime) -> str:
    """*when* to the second, UTC: ``2026-01-31 23:59:59Z``."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def format_metrics(metrics: Mapping[str, float]) -> str:
    """``loss=3.2189, val_loss=nan``."""
    return ", ".join(f"{name}={value:.5g}" for name, value in metrics.items())


def json_value(value: Any) -> Any:
    """*value* as strict JSON: floats that JSON has no word for become ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
        return hex(value)  # Python refuses to write so many decimal digits
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(json_value(document), indent=2, allow_nan=False), flush=True)


@dataclass(frozen=True, slots=True)
class Column:
    """A table column; numbers are flush right."""

    title: str
    right: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print *rows* under *columns*: a rich table on a terminal, aligned plain text elsewhere."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if is_terminal():
        _print_rich(columns, rows)
    else:
        _print_plain(columns, rows)


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    titles = [column.title for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        print("  ".join(cells).rstrip())


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: square brackets in a shape are no markup
    Console().print(table)
