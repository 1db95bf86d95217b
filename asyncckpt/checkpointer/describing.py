"""What a checkpoint says about itself besides the state."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import KINDS

__all__ = ["checked_kind", "checked_metrics", "checked_options", "checked_step", "checked_tags", "versions"]

_RESERVED_TAGS = ("latest", "best")


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
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last one is torch's
        raise InvalidOptionError(f"metrics are numbers by name, not {metrics!r}: {error}") from error


def checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """*tags*, each once.

    Raises:
        InvalidOptionError: they are one text, or one of them is empty, no text, or a name that finds others.
    """
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise InvalidOptionError(f"tags are a list of texts, not {tags!r}")
    for tag in tags:
        if not isinstance(tag, str) or not tag or tag in _RESERVED_TAGS:
            raise InvalidOptionError(f"a tag is a text other than {', '.join(map(repr, _RESERVED_TAGS))}, not {tag!r}")
    return tuple(dict.fromkeys(tags))


def checked_options(**options: tuple[Any, type]) -> None:
    """Look at the types of option groups, given as ``name=(value, type)``, before anything is started with them.

    Raises:
        InvalidOptionError: one is neither None nor of its type.
    """
    for name, (value, wanted) in options.items():
        if value is not None and not isinstance(value, wanted):
            raise InvalidOptionError(f"{name}= takes a {wanted.__name__}, not {value!r}")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the software that decides what is in a checkpoint."""
    names = ("asyncckpt", "torch", "zarr", "numcodecs")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
