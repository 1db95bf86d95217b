"""Python values as JSON nodes: the exact structure of the state, without pickle.

``None``, ``bool``, ``str``, small ``int``, finite ``float``, ``list`` and ``dict`` with plain string keys
are themselves. Everything else is an object with a tag under ``"$"``; ``docs/format.md`` lists them.
"""

from __future__ import annotations

import base64
import enum
import math
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePath
from typing import Any

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, UnsupportedStateError

__all__ = ["MAX_DEPTH", "TAG", "Node", "below", "decode_value", "encode_value"]

MAX_DEPTH = 64
# A value may be encoded in parts, each of which counts from zero: keys and `_metadata` below a container.
_MAX_DECODE_DEPTH = 2 * MAX_DEPTH + 4
TAG = "$"
_SAFE_INT = 2**53

Node = Any
"""A JSON value: None, bool, int, float, str, list, or dict with string keys."""

EncodeLeaf = Callable[[Any, str], Node | None]
DecodeLeaf = Callable[[dict[str, Any], int], Any]
"""Makes the value of a node, given how deep it is."""


def encode_value(value: Any, path: str, leaf: EncodeLeaf, depth: int = 0) -> Node:
    """The node of *value*.

    Args:
        value: the value; types are matched exactly, subclasses go to *leaf*.
        path: where it is, for errors; ``/``-joined.
        leaf: makes nodes of the types this module does not know; None means it does not either.
        depth: how many levels are above it already.

    Raises:
        UnsupportedStateError: no one can encode it, or it is nested deeper than `MAX_DEPTH`.
    """
    return _Encoder(leaf).encode(value, path, depth)


class _Encoder:
    def __init__(self, leaf: EncodeLeaf) -> None:
        self._leaf = leaf

    def encode(self, value: Any, path: str, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _too_deep(path)
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
        if isinstance(value, enum.Enum) and _find_class(_enum_name(kind)) is kind:
            return _encode_enum(value)
        if isinstance(value, PurePath):
            return {TAG: "path", "value": _encode_str(str(value))}
        node = self._leaf(value, path)
        if node is None and isinstance(value, enum.Enum):
            raise UnsupportedStateError(
                f"{path} holds a {kind.__module__}.{kind.__qualname__}, an enum that no restore could find: "
                "define it at the top level of its module",
                key=path,
                type=f"{kind.__module__}.{kind.__qualname__}",
            )
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
            return {key: self.encode(item, below(path, key), depth + 1) for key, item in value.items()}
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
            [self._key(key, path, depth), self.encode(item, below(path, key), depth + 1)] for key, item in value.items()
        ]

    def _key(self, key: Any, path: str, depth: int) -> Node:
        if key is None or type(key) in (str, bool, int, float):
            return self.encode(key, path, depth)
        if type(key) is tuple:
            if depth > MAX_DEPTH:  # an empty tuple at the bottom would escape the check in `encode`
                raise _too_deep(path)
            return {TAG: "tuple", "items": [self._key(item, path, depth + 1) for item in key]}
        raise UnsupportedStateError(
            f"{path} has a {type(key).__qualname__} as key; keys are str, int, float, bool, None or tuples of them",
            key=path,
            type=type(key).__qualname__,
        )


def _too_deep(path: str) -> UnsupportedStateError:
    return UnsupportedStateError(f"{path[:200]} is nested more than {MAX_DEPTH} levels deep", key=path[:200])


def below(path: str, key: Any) -> str:
    """The path of what *key* names in the container at *path*."""
    return f"{path}/{key}" if path else str(key)


def _find_class(name: str) -> Any:
    """What is called ``module:QualName`` here; None if there is nothing.

    Only in modules this process has imported by itself, and never through ``getattr``, which modules
    may use to import more: a checkpoint must not cause an import.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


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


def _enum_name(kind: type[enum.Enum]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _encode_enum(member: enum.Enum) -> Node:
    kind = type(member)
    node = {TAG: "enum", "type": _enum_name(kind)}
    # Several flags, or none, are no member of their own: Access.READ | Access.WRITE.
    if isinstance(member, enum.Flag) and member.name not in kind.__members__:
        return {**node, "value": _encode_int(member.value)}
    return {**node, "name": member.name}


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
        UnsupportedStateError: an enum class that is not imported in this process, or a member it lacks.
    """
    try:
        return _Decoder(leaf).decode(node, depth)
    except CheckpointError:  # UnsupportedStateError is also a TypeError, and not damage that a restore falls back from
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise CorruptCheckpointError(f"the state tree is malformed: {type(error).__name__}: {error}") from error


class _Decoder:
    def __init__(self, leaf: DecodeLeaf) -> None:
        self._leaf = leaf

    def decode(self, node: Node, depth: int) -> Any:
        if depth > _MAX_DECODE_DEPTH:
            raise CorruptCheckpointError(
                f"the state tree is nested too deep, more than {_MAX_DECODE_DEPTH} levels deep"
            )
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            return {key: self.decode(item, depth + 1) for key, item in node.items()}
        tag = node[TAG]
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
    name = node["type"]
    found = _find_class(name)
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        module, _, path = name.partition(":")
        raise UnsupportedStateError(
            f"the checkpoint holds a {module}.{path}, which is not an enum imported here; import {module} first",
            type=name,
        )
    is_flag = "value" in node and issubclass(found, enum.Flag)
    member: Any = _decode_int(node["value"]) if is_flag else node["name"]
    try:
        return found(member) if is_flag else found[member]
    except (KeyError, ValueError):
        raise UnsupportedStateError(
            f"the checkpoint holds {str(member)[:100]!r} of {name.replace(':', '.')}, which has no such member now",
            type=name,
        ) from None


def _decode_int(node: Node) -> int:
    return int(node["value"], 16) if isinstance(node, dict) else int(node)


def _decode_str(node: Node) -> str:
    return node if isinstance(node, str) else _from_base64(node["value"]).decode("utf-8", "surrogatepass")


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_TINY_OFFSET = re.compile(r"[+-]00:00:00(\.\d{6})\Z")


def _decode_datetime(node: dict[str, Any]) -> datetime:
    text = node["value"]
    value = datetime.fromisoformat(text)
    if (tiny := _TINY_OFFSET.search(text)) is not None:
        # The C implementation takes an offset below one second for UTC.
        sign = -1 if tiny[0].startswith("-") else 1
        value = value.replace(tzinfo=timezone(sign * timedelta(microseconds=int(tiny[1][1:]))))
    return value.replace(fold=node["fold"])


_SIMPLE_TAGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int": _decode_int,
    "float": lambda node: struct.unpack(">d", bytes.fromhex(node["bits"]))[0],
    "complex": lambda node: complex(_part(node["real"]), _part(node["imag"])),
    "str": _decode_str,
    "bytes": lambda node: _from_base64(node["value"]),
    "path": lambda node: Path(_decode_str(node["value"])),
    "datetime": _decode_datetime,
    "enum": _decode_enum,
}


def _part(node: Node) -> float:
    return float(_SIMPLE_TAGS["float"](node) if isinstance(node, dict) else node)
