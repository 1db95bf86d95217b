"""What a checkpoint says about itself besides the state."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Mapping

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import KINDS

__all__ = ["checked_kind", "checked_metrics", "checked_step", "versions"]


def checked_step(step: int) -> int:
    """*step*, if it can be one.

    Raises:
        InvalidOptionError: it is negative, has more than 18 digits or is no whole number.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise InvalidOptionError(f"a step is a whole number from 0 to 18 digits, not {step!r}", step=repr(step))
    return step


def checked_kind(kind: str) -> str:
    """*kind*, if it is one of `model.KINDS`.

    Raises:
        InvalidOptionError: it is not.
    """
    if kind not in KINDS:
        raise InvalidOptionError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    return kind


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """*metrics* as plain floats.

    Raises:
        InvalidOptionError: one of them is no number.
    """
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidOptionError(f"metrics are numbers by name, not {dict(metrics)!r}: {error}") from error


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the software that decides what is in a checkpoint."""
    names = ("asyncckpt", "torch", "zarr", "numcodecs")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
