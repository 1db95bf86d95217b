"""The state of a checkpoint of which some arrays are lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.format.tree import Node
from asyncckpt.model import Damage
from asyncckpt.state.fresh import Fresh, ScratchTensors
from asyncckpt.state.optimizer import StoredOptimizer
from asyncckpt.state.stored import StoredArray, StoredCustom, StoredQuantized, StoredTensor, array_keys, decode_tree

__all__ = ["build_partial"]

_LOST = object()


def build_partial(tree: Node, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], list[Damage]]:
    """As `apply.LoadPlan.build`, from the arrays that are there.

    Entries of dicts that are lost are left out, lost elements of lists and tuples are None. A
    quantised tensor, or a value of a registered type, is lost with any of its parts.

    Args:
        tree: the tree `capture` made.
        tensors: intact arrays by key. The result keeps their memory.

    Returns:
        The state, and which arrays of *tensors* are not what the tree says.

    Raises:
        CorruptCheckpointError: *tree* is malformed.
        UnsupportedStateError: a type that is not registered here.
    """
    pruner = _Pruner(Fresh(ScratchTensors(tensors), copy=False, to_devices=False), tensors.keys())
    state: dict[str, Any] = pruner.value(decode_tree(tree))
    return state, pruner.damaged


class _Pruner:
    def __init__(self, fresh: Fresh, present: Any) -> None:
        self._fresh = fresh
        self._present = present
        self.damaged: list[Damage] = []

    def value(self, stored: Any) -> Any:
        """What `Fresh.value` gives for *stored* without what is lost; `_LOST` if that is all of it."""
        kind = type(stored)
        if kind in (StoredTensor, StoredArray, StoredQuantized, StoredCustom):
            return self._whole(stored)
        if isinstance(stored, dict):
            return self._dict(stored)
        if kind in (list, tuple):
            parts = (self.value(part) for part in stored)
            return kind(None if part is _LOST else part for part in parts)
        if kind is StoredOptimizer:
            return self.value(stored.standard())
        return stored

    def _dict(self, stored: dict[Any, Any]) -> dict[Any, Any]:
        parts = ((key, self.value(part)) for key, part in stored.items())
        value = type(stored)((key, part) for key, part in parts if part is not _LOST)
        if hasattr(stored, "_metadata"):
            value._metadata = stored._metadata  # type: ignore[attr-defined]
        return value

    def _whole(self, stored: Any) -> Any:
        keys = list(array_keys(stored))
        if not all(key in self._present for key in keys):
            return _LOST
        try:
            return self._fresh.value(stored)
        except CorruptCheckpointError as error:
            self.damaged += [Damage(f"{key}/zarr.json", error.message, key) for key in keys]
            return _LOST
