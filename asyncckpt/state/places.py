"""Places in a state, and nodes on their way through the tree module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from asyncckpt.format.tree import Node, encode_value

__all__ = ["Finished", "Place", "encode_plain", "finished_parts"]


class Place(NamedTuple):
    """Where a value is.

    Attributes:
        path: for people, ``model/weight``.
        key: for arrays, ``state/model/weight``.
        depth: levels above it.
        is_inside: whether it is part of what an object or a codec returned.
    """

    path: str
    key: str
    depth: int
    is_inside: bool

    def below(self, name: object, component: str) -> Place:
        """The place of a part."""
        path = f"{self.path}/{name}" if self.path else str(name)
        return Place(path, f"{self.key}/{component}", self.depth + 1, self.is_inside)

    def inside(self) -> Place:
        """The same place, within an object."""
        return self._replace(depth=self.depth + 1, is_inside=True)


class Finished:
    """Carries a finished node through `encode_value`."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node


def encode_plain(value: Any, path: str) -> Node:
    """Let the tree module encode *value*, whose parts may be finished nodes already."""
    return encode_value(value, path, lambda part, _: part.node if type(part) is Finished else None)


def finished_parts(nodes: Mapping[Any, Node]) -> dict[Any, Finished]:
    """*nodes* ready for `encode_plain`."""
    return {key: Finished(node) for key, node in nodes.items()}
