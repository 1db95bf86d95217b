"""``only=``: which part of a checkpoint is meant."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from asyncckpt.errors import InvalidOptionError
from asyncckpt.state.stored import children

__all__ = ["Only", "Selection"]

Only = str | Sequence[str] | None
"""Glob patterns over ``/``-joined paths; None is everything."""


class Selection:
    """Decides by path. A pattern selects what it matches and everything below it; ``*`` matches ``/`` too.

    Args:
        only: patterns such as ``"model"``, ``"model/*"`` or ``"*/transformer.h.0.*"``.

    Raises:
        InvalidOptionError: *only* is neither a text nor a sequence of texts.
    """

    def __init__(self, only: Only) -> None:
        self._patterns: tuple[str, ...] | None = None
        if only is None:
            return
        patterns = (only,) if isinstance(only, str) else tuple(only) if isinstance(only, Iterable) else (only,)
        self._patterns = patterns
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise InvalidOptionError(f"only= takes glob patterns as texts, not {only!r}")
        self._regexes = [_compile(pattern) for pattern in self._patterns]

    @property
    def is_everything(self) -> bool:
        """Whether nothing was excluded."""
        return self._patterns is None

    def __contains__(self, path: str) -> bool:
        return self._patterns is None or any(regex.match(path) for regex in self._regexes)

    def extent(self, stored: Any, path: str) -> Literal["all", "some", "none"]:
        """How much of *stored*, which lies at *path*, is selected."""
        if path in self:
            return "all"
        found = {leaf in self for leaf in _leaf_paths(stored, path)}
        if found == {True}:
            return "all"
        return "some" if True in found else "none"

    def check(self, state: dict[str, Any]) -> None:
        """Refuse patterns that match nothing: most likely a typing error.

        Raises:
            InvalidOptionError: there is one.
        """
        if self._patterns is None:
            return
        paths = [path for name, stored in state.items() for path in (name, *_leaf_paths(stored, name))]
        for pattern, regex in zip(self._patterns, self._regexes, strict=True):
            if not any(map(regex.match, paths)):
                raise InvalidOptionError(
                    f"only={pattern!r} matches nothing in the checkpoint, which holds {', '.join(state) or 'nothing'}"
                )

    def prune(self, stored: Any, path: str = "") -> Any:
        """*stored* with only the selected entries of its dicts; other values are kept or dropped whole."""
        if self._patterns is None or (path and path in self):
            return stored
        if not isinstance(stored, dict):
            return stored
        pruned = {key: part for key, part in stored.items() if self.extent(part, _below(path, key)) != "none"}
        copy = type(stored)((key, self.prune(part, _below(path, key))) for key, part in pruned.items())
        if hasattr(stored, "_metadata"):
            copy._metadata = stored._metadata  # type: ignore[attr-defined]
        return copy


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(f"{fnmatch.translate(pattern)}|{fnmatch.translate(pattern.rstrip('/') + '/*')}")


def _leaf_paths(stored: Any, path: str) -> Iterator[str]:
    is_leaf = True
    for key, part in children(stored):
        is_leaf = False
        yield from _leaf_paths(part, _below(path, key))
    if is_leaf:
        yield path


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)
