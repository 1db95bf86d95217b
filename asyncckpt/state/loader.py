"""What loading one object takes, in steps that make a whole restore all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from asyncckpt.state.backup import copied
from asyncckpt.state.fresh import Fresh
from asyncckpt.state.stateful import Stateful
from asyncckpt.state.stored import array_keys
from asyncckpt.state.tensors import copy_exact

__all__ = ["GENERATORS", "OBJECTS", "Copies", "Loader", "ObjectLoader", "copy_all"]

OBJECTS, GENERATORS = 0, 3
"""Ranks of `ObjectLoader`; modules and optimizers are between."""

Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of target and source that cannot fail to be copied."""


class Loader(Protocol):
    """Loads one object. `prepare` of all loaders comes first, then `load` of all, then `finish` of all.

    Attributes:
        path: where the object is in the state.
        rank: the order of `load`; low ones first.
    """

    path: str
    rank: int

    def array_keys(self) -> Iterator[str]:
        """Arrays it needs."""

    def prepare(self, fresh: Fresh) -> None:
        """Make everything ready and remember the present state. Changes nothing; may fail."""

    def load(self) -> None:
        """Run the user's code. May fail, also half-way."""

    def undo(self) -> None:
        """Go back to the state of `prepare`, after `load` ran, or failed."""

    def finish(self) -> None:
        """What cannot fail and cannot be undone: copies into live tensors."""


class ObjectLoader:
    """Hands an object of the user's what it once returned from ``state_dict()``.

    Args:
        target: the object.
        stored: its state.
        path: where it is.
        rank: generators go last, because loading anything else may draw from them.
    """

    def __init__(self, target: Stateful, stored: Any, path: str, rank: int) -> None:
        self.path = path
        self.rank = rank
        self._target = target
        self._stored = stored
        self._value: Any = None
        self._before: Any = None
        self._has_before = False

    def array_keys(self) -> Iterator[str]:
        return array_keys(self._stored)

    def prepare(self, fresh: Fresh) -> None:
        try:
            live = self._target.state_dict()
        except Exception:  # an object that was never used may have no state to give, and none to go back to
            live = None
        else:
            self._before, self._has_before = copied(live), True
        self._value = fresh.value(self._stored, live)

    def load(self) -> None:
        self._target.load_state_dict(self._value)

    def undo(self) -> None:
        if not self._has_before:
            raise RuntimeError("it had no state to go back to")
        self._target.load_state_dict(self._before)

    def finish(self) -> None:
        self._value = self._before = None


def copy_all(copies: Copies) -> None:
    """Copy every pair, then wait for the devices: the sources are scratch memory."""
    with torch.no_grad():
        for target, source in copies:
            copy_exact(target, source)
    for device in {target.device for target, _ in copies if not target.is_cpu}:
        torch.accelerator.synchronize(device)
