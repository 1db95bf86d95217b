"""Python values as JSON nodes: the exact structure of the state, without pickle.

``None``, ``bool``, ``str``, small ``int``, finite ``float``, ``list`` and ``dict`` with plain string keys
are themselves. Everything else is an object with a tag under ``"$"``; ``docs/format.md`` lists them.
"""

from __future__ import annotations

import base64
import enum
import math
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from asyncckpt.errors import CorruptCheckpointError, UnsupportedStateError

__all__ = ["MAX_DEPTH", "Node", "decode_value", "encode_value", "iter_tensors"]

MAX_DEPTH = 64
TAG = "$"
_SAFE_INT = 2**53
# A value of ours at the deepest level may itself take a few levels of JSON.
_MAX_NODE_DEPTH = 4 * MAX_DEPTH

Node = Any
"""A JSON value: None, bool, int, float, str, list, or dict with string keys."""

EncodeLeaf = Callable[[Any, str], Node | None]
DecodeLeaf = Callable[[dict[str, Any], int], Any]
"""Makes the value of a node, given how deep it is."""


def encode_value(value: Any, path: str, leaf: EncodeLeaf) -> Node:
    """The node of *value*.

    Args:
        value: the value; types are matched exactly, subclasses go to *leaf*.
        path: where it is, for errors; ``/``-joined.
        leaf: makes nodes of the types this module does not know; None means it does not either.

    Raises:
        UnsupportedStateError: no one can encode it, or it is nested deeper than `MAX_DEPTH`.
    """
    return _Encoder(leaf).encode(value, path, 0)


class _Encoder:
    def __init__(self, leaf: EncodeLeaf) -> None:
        self._leaf = leaf

    def encode(self, value: Any, path: str, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise UnsupportedStateError(f"{path[:200]} is nested more than {MAX_DEPTH} levels deep", key=path[:200])
        kind = type(value)
        if value is None or kind is bool:
            return value
        if (simple := _SCALARS.get(kind)) is not None:
            return simple(value)
        if kind is list:
            return [self.encode(item, f"{path}/{index}", depth + 1) for index, item in enumerate(value)]
        if kind is tuple:
            items = [self.encode(item, f"{path}/{index}", depth + 1) for index, item in enumerate(value)]
            return {TAG: "tuple", "items": items}
        if kind is dict:
            return self._dict(value, path, depth)
        if kind is OrderedDict:
            return self._ordered(value, path, depth)
        if isinstance(value, enum.Enum):
            return {TAG: "enum", "type": f"{kind.__module__}:{kind.__qualname__}", "name": value.name}
        if isinstance(value, PurePath):
            return {TAG: "path", "value": str(value)}
        node = self._leaf(value, path)
        if node is None:
            raise UnsupportedStateError(
                f"{path} holds a {kind.__module__}.{kind.__qualname__}, which cannot be stored; remove it from the "
                "state or register a codec with asyncckpt.register_type",
                key=path,
                type=f"{kind.__module__}.{kind.__qualname__}",
            )
        return node

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> Node:
        if all(type(key) is str and key != TAG and _is_text(key) for key in value):
            return {key: self.encode(item, _below(path, key), depth + 1) for key, item in value.items()}
        return {TAG: "dict", "items": self._items(value, path, depth)}

    def _ordered(self, value: OrderedDict[Any, Any], path: str, depth: int) -> Node:
        node = {TAG: "odict", "items": self._items(value, path, depth)}
        # torch keeps the versions of its modules in an attribute of the state dict.
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            node["meta"] = self.encode(dict(metadata), f"{path}._metadata", depth + 1)
        return node

    def _items(self, value: dict[Any, Any], path: str, depth: int) -> list[Node]:
        return [
            [self._key(key, path, depth), self.encode(item, _below(path, key), depth + 1)]
            for key, item in value.items()
        ]

    def _key(self, key: Any, path: str, depth: int) -> Node:
        if key is None or type(key) in (str, bool, int, float):
            return self.encode(key, path, depth)
        if type(key) is tuple:
            return {TAG: "tuple", "items": [self._key(item, path, depth + 1) for item in key]}
        raise UnsupportedStateError(
            f"{path} has a {type(key).__qualname__} as key; keys are str, int, float, bool, None or tuples of them",
            key=path,
            type=type(key).__qualname__,
        )


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encode_int(value: int) -> Node:
    return value if -_SAFE_INT <= value <= _SAFE_INT else {TAG: "int", "value": hex(value)}


def _encode_float(value: float) -> Node:
    return value if math.isfinite(value) else {TAG: "float", "bits": struct.pack(">d", value).hex()}


def _encode_str(value: str) -> Node:
    if _is_text(value):
        return value
    return {TAG: "str", "value": _base64(value.encode("utf-8", "surrogatepass"))}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_SCALARS: dict[type, Callable[[Any], Node]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    complex: lambda value: {TAG: "complex", "real": _encode_float(value.real), "imag": _encode_float(value.imag)},
    bytes: lambda value: {TAG: "bytes", "value": _base64(value)},
    datetime: lambda value: {TAG: "datetime", "value": value.isoformat(), "fold": value.fold},
}


def decode_value(node: Node, leaf: DecodeLeaf, depth: int = 0) -> Any:
    """The value of *node*; the inverse of `encode_value`.

    Args:
        node: a tree as read from a header.
        leaf: makes values of the tags this module does not know.
        depth: how deep *node* is; the limit is for whole trees.

    Raises:
        CorruptCheckpointError: *node* is not a tree, or is nested too deep.
        UnsupportedStateError: an enum class that is not imported in this process.
    """
    try:
        return _Decoder(leaf).decode(node, depth)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, struct.error) as error:
        raise CorruptCheckpointError(f"the state tree is malformed: {type(error).__name__}: {error}") from error


class _Decoder:
    def __init__(self, leaf: DecodeLeaf) -> None:
        self._leaf = leaf

    def decode(self, node: Node, depth: int) -> Any:
        if depth > MAX_DEPTH + 1:
            raise CorruptCheckpointError(f"the state tree is nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        tag = node.get(TAG)
        if tag is None:
            return {key: self.decode(item, depth + 1) for key, item in node.items()}
        if (simple := _SIMPLE_TAGS.get(tag)) is not None:
            return simple(node)
        if tag == "tuple":
            return tuple(self.decode(item, depth + 1) for item in node["items"])
        if tag == "dict":
            return {self.decode(key, depth + 1): self.decode(item, depth + 1) for key, item in node["items"]}
        if tag == "odict":
            return self._ordered(node, depth)
        return self._leaf(node, depth)

    def _ordered(self, node: dict[str, Any], depth: int) -> OrderedDict[Any, Any]:
        items = [(self.decode(key, depth + 1), self.decode(item, depth + 1)) for key, item in node["items"]]
        value: OrderedDict[Any, Any] = OrderedDict(items)
        if "meta" in node:
            value._metadata = OrderedDict(self.decode(node["meta"], depth + 1))  # type: ignore[attr-defined]
        return value


def _decode_enum(node: dict[str, Any]) -> enum.Enum:
    # Only classes this process has imported by itself: a checkpoint must never cause an import. So no getattr,
    # which runs the __getattr__ of a module that imports its parts lazily.
    module, _, name = node["type"].partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        raise UnsupportedStateError(
            f"the checkpoint holds a {node['type'].replace(':', '.')}, which is not an enum imported here; "
            f"import {module} first",
            type=node["type"],
        )
    return found[node["name"]]


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_SIMPLE_TAGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": lambda node: int(node["value"], 16),
    "float": lambda node: struct.unpack(">d", bytes.fromhex(node["bits"]))[0],
    "complex": lambda node: complex(_part(node["real"]), _part(node["imag"])),
    "str": lambda node: _from_base64(node["value"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda node: _from_base64(node["value"]),
    "path": lambda node: Path(node["value"]),
    "datetime": lambda node: datetime.fromisoformat(node["value"]).replace(fold=node["fold"]),
    "enum": _decode_enum,
}


def _part(node: Node) -> float:
    return float(_SIMPLE_TAGS["float"](node) if isinstance(node, dict) else node)


def iter_tensors(node: Node, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tensor and array node below *node*, with its ``/``-joined path, in order.

    Raises:
        CorruptCheckpointError: *node* is malformed; what comes is well-formed.
    """
    stack: list[tuple[str, Node, int]] = [(path, node, 0)]
    try:
        while stack:
            path, node, depth = stack.pop()
            if depth > _MAX_NODE_DEPTH:
                raise CorruptCheckpointError("the state tree is nested too deep")
            if isinstance(node, dict) and node.get(TAG) in ("tensor", "ndarray"):
                yield path, _checked_tensor(node)
            else:
                stack.extend((_below(path, key), item, depth + 1) for key, item in reversed(_parts(node)))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"the state tree is malformed: {type(error).__name__}: {error}") from error


def _parts(node: Node) -> list[tuple[Any, Node]]:
    if isinstance(node, list):
        return list(enumerate(node))
    if not isinstance(node, dict):
        return []
    tag = node.get(TAG)
    if tag == "tuple":
        return list(enumerate(node["items"]))
    if tag in ("dict", "odict"):
        return [(_text(key), item) for key, item in node["items"]]
    return [(key, item) for key, item in node.items() if key != TAG]


def _checked_tensor(node: dict[str, Any]) -> dict[str, Any]:
    shape = node["shape"]
    if not (
        isinstance(node["key"], str)
        and isinstance(node["dtype"], str)
        and isinstance(shape, list)
        and all(type(length) is int and 0 <= length < 2**63 for length in shape)
    ):
        raise CorruptCheckpointError(f"a tensor in the state tree is malformed: {str(node)[:200]}")
    return node


def _text(key: Node) -> str:
    return str(decode_value(key, lambda node, _: node)) if isinstance(key, dict) else str(key)
