"""Checks that the policies share."""

from __future__ import annotations

import math

from asyncckpt.errors import InvalidOptionError

__all__ = ["require_count", "require_duration"]


def require_count(name: str, value: object, minimum: int) -> None:
    """Raise unless *value* is a whole number (not a bool) of at least *minimum*."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidOptionError(f"{name} must be a whole number from {minimum}, not {value!r}")


def require_duration(name: str, value: object) -> None:
    """Raise unless *value* is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise InvalidOptionError(f"{name} must be a positive number, not {value!r}")
