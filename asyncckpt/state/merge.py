"""New contents of the user's containers, worked out first and put in place afterwards."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from asyncckpt.state.fresh import Fresh

__all__ = ["REFILLABLE", "Keep", "MergedDict", "MergedList", "MergedTuple", "Part", "Refill", "Take"]

Updates = list[Callable[[], None]]


class Part(Protocol):
    """What will stand at one place of the state after the restore."""

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        """The object that will stand there. Changes nothing; what has to be done is added to *updates*."""

    def taken(self) -> Iterator[Any]:
        """Decoded values it makes new objects of."""


@dataclass(frozen=True, slots=True)
class Keep:
    """The live object, which is updated in place by others or not at all."""

    live: Any

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        return self.live

    def taken(self) -> Iterator[Any]:
        return iter(())


@dataclass(frozen=True, slots=True)
class Take:
    """A new object from the checkpoint."""

    stored: Any

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        return fresh.value(self.stored)

    def taken(self) -> Iterator[Any]:
        yield self.stored


@dataclass(frozen=True, slots=True)
class MergedDict:
    """The live dict with other entries."""

    live: dict[Any, Any]
    parts: dict[Any, Part]

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        entries = {key: part.evaluate(fresh, updates) for key, part in self.parts.items()}
        updates.append(partial(_refill, self.live, entries))
        return self.live

    def taken(self) -> Iterator[Any]:
        return _taken(self.parts.values())


@dataclass(frozen=True, slots=True)
class MergedList:
    """The live list with other elements."""

    live: list[Any]
    parts: list[Part]

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        elements = [part.evaluate(fresh, updates) for part in self.parts]
        updates.append(partial(self.live.__setitem__, slice(None), elements))
        return self.live

    def taken(self) -> Iterator[Any]:
        return _taken(self.parts)


@dataclass(frozen=True, slots=True)
class MergedTuple:
    """The live tuple, or a new one where immutable elements changed."""

    live: tuple[Any, ...]
    parts: list[Part]

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        elements = tuple(part.evaluate(fresh, updates) for part in self.parts)
        is_same = len(elements) == len(self.live) and all(
            new is old for new, old in zip(elements, self.live, strict=True)
        )
        return self.live if is_same else elements

    def taken(self) -> Iterator[Any]:
        return _taken(self.parts)


REFILLABLE: tuple[type, ...] = (Counter, set, deque)
"""Mutable containers whose contents can be exchanged; exact types, whose methods cannot fail."""


@dataclass(frozen=True, slots=True)
class Refill:
    """The live container with the contents of a new one of its type."""

    live: Any
    stored: Any

    def evaluate(self, fresh: Fresh, updates: Updates) -> Any:
        value = fresh.value(self.stored)
        # A deque cannot change its bound; a value of another type cannot be poured over either.
        if type(value) is not type(self.live) or getattr(value, "maxlen", None) != getattr(self.live, "maxlen", None):
            return value
        updates.append(partial(_refill, self.live, value))
        return self.live

    def taken(self) -> Iterator[Any]:
        yield self.stored


def _taken(parts: Iterable[Part]) -> Iterator[Any]:
    for part in parts:
        yield from part.taken()


def _refill(live: Any, contents: Any) -> None:
    live.clear()
    if isinstance(live, deque):
        live.extend(contents)
    else:
        live.update(contents)
