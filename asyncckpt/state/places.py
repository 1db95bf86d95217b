"""Places in a state, and nodes on their way through the tree module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from asyncckpt.format.tree import Node, encode_value

__all__ = ["Place", "encode_plain", "finished", "finished_parts"]


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


def encode_plain(value: Any, place: Place) -> Node:
    """Let the tree module encode *value* at *place*; its parts may be finished nodes already."""
    return encode_value(value, place.path, lambda part, _: part.node if type(part) is Finished else None, place.depth)


def finished(node: Node) -> Finished | None:
    """*node* as a part of a container for `encode_plain`, where None means an unknown type, so it stays itself."""
    return None if node is None else Finished(node)


def finished_parts(nodes: Mapping[Any, Node]) -> dict[Any, Finished | None]:
    """*nodes* ready for `encode_plain`."""
    return {key: finished(node) for key, node in nodes.items()}
