"""Unique components of array keys for the keys of a container."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from asyncckpt.format.paths import escape_component

__all__ = ["components", "has_plain_keys", "is_json_text"]


def components(keys: Collection[Any]) -> list[str]:
    """One key component per container key, all different.

    A text is its escaped form. Anything else is written as text too, ``3`` for the integer 3, unless
    a sibling has that name already; then its type goes first: ``int%3A3``. Arrays and groups of one
    container so never meet under one key, at any depth.
    """
    if set(map(type, keys)) <= {str}:
        return [escape_component(key) for key in keys]
    taken = {escape_component(key) for key in keys if type(key) is str}
    return [escape_component(key) if type(key) is str else _claim(key, taken) for key in keys]


def _claim(key: Any, taken: set[str]) -> str:
    text = repr(key)
    component = escape_component(text)
    while component in taken:
        text = f"{type(key).__name__}:{text}"
        component = escape_component(text)
    taken.add(component)
    return component


def has_plain_keys(mapping: dict[Any, Any]) -> bool:
    """Whether *mapping* is a plain JSON object in a tree: text keys, none of them the tag ``"$"``."""
    return set(map(type, mapping)) <= {str} and "$" not in mapping and is_json_text("".join(mapping))


def is_json_text(text: str) -> bool:
    """Whether JSON can hold *text*: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
