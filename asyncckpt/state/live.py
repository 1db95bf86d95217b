"""Looks for objects in the user's containers, which may contain themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncckpt.state.stateful import is_stateful

__all__ = ["find_modules", "holds_objects"]


def find_modules(state: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Modules in *state*, in order, with the path where each is first met."""
    for path, value in _walk(state, "", set()):
        if isinstance(value, nn.Module):
            yield path, value


def holds_objects(value: Any) -> bool:
    """Whether *value* is, or contains, something that is restored in place and must not be replaced."""
    return any(isinstance(part, (torch.Tensor, np.ndarray)) or is_stateful(part) for _, part in _walk(value, "", set()))


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """*value* and everything in it, each container once."""
    yield path, value
    parts: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        parts = value.items()
    elif type(value) in (list, tuple):
        parts = enumerate(value)
    else:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, part in parts:
        yield from _walk(part, f"{path}/{key}" if path else str(key), seen)
