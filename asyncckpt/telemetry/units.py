"""Quantities as people read them: three digits and a decimal unit."""

from __future__ import annotations

__all__ = ["format_bytes", "format_rate", "format_ratio", "format_seconds"]


def format_bytes(count: float) -> str:
    """Bytes with a decimal unit: ``1.9 GB``, ``812 MB``."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 9.95 and unit != "B" else f"{value:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Seconds: ``0.4 ms``, ``41 ms``, ``2.31 s``, ``75 s``."""
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"


def format_rate(count: float, seconds: float) -> str:
    """Bytes per second: ``812 MB/s``."""
    return f"{format_bytes(count / seconds)}/s" if seconds > 0 else "- B/s"


def format_ratio(raw_bytes: int, stored_bytes: int) -> str:
    """How many times smaller the stored bytes are: ``1.31x``."""
    return f"{raw_bytes / stored_bytes:.2f}x" if stored_bytes else "-x"
