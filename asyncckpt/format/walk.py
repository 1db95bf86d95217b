"""Finds the tensors of a tree without decoding it: for tools that only look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.tree import TAG, Node, below, decode_value

__all__ = ["iter_tensors"]

# Levels of JSON; a level of values takes up to three. Paths would grow with every level.
_MAX_NODE_DEPTH = 512


def iter_tensors(node: Node, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tensor and array node below *node*, with its ``/``-joined path, in order.

    Raises:
        CorruptCheckpointError: *node* is not a tree.
    """
    stack: list[tuple[str, Node, int]] = [(path, node, 0)]
    while stack:
        path, node, depth = stack.pop()
        if depth > _MAX_NODE_DEPTH:
            raise CorruptCheckpointError("the state tree is nested too deep")
        if isinstance(node, dict) and node.get(TAG) in ("tensor", "ndarray"):
            yield path, _checked_tensor(node)
            continue
        try:
            parts = [(below(path, key), item, depth + 1) for key, item in _parts(node)]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"the state tree is malformed: {type(error).__name__}: {error}") from error
        stack.extend(reversed(parts))


def _parts(node: Node) -> Iterable[tuple[Any, Node]]:
    if isinstance(node, list):
        return enumerate(node)
    if not isinstance(node, dict):
        return ()
    if node.get(TAG) in ("dict", "odict"):
        return ((_text(key), item) for key, item in node["items"])
    if node.get(TAG) == "tuple":
        return enumerate(node["items"])
    return ((key, item) for key, item in node.items() if key != TAG)


def _text(key: Node) -> str:
    return str(decode_value(key, lambda node, _: node)) if isinstance(key, dict) else str(key)


def _checked_tensor(node: dict[str, Any]) -> dict[str, Any]:
    key, dtype, shape = (node.get(name) for name in ("key", "dtype", "shape"))
    if (
        not isinstance(key, str)
        or not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not all(type(length) is int and 0 <= length < 2**63 for length in shape)
    ):
        raise CorruptCheckpointError(f"the state tree has a malformed tensor {str(node)[:200]}")
    return node
