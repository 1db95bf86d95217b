"""What loading one object takes, in steps that make a whole restore all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from asyncckpt.state.backup import copied
from asyncckpt.state.fresh import Fresh
from asyncckpt.state.stateful import Stateful
from asyncckpt.state.stored import array_keys
from asyncckpt.state.tensors import PLAIN_KINDS, copy_exact, local_part
from asyncckpt.state.torch_types import is_bytes_only
from asyncckpt.state.upload import Uploader

__all__ = ["GENERATORS", "OBJECTS", "Copies", "Loader", "ObjectLoader", "Transfer"]

OBJECTS, GENERATORS = 0, 3
"""Ranks of `ObjectLoader`; modules and optimizers are between."""

Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of target and source that cannot fail to be copied."""


class Loader(Protocol):
    """Loads one object. `prepare` of all loaders comes first, then `load` of all, then `finish` of all.

    Attributes:
        path: where the object is in the state.
        rank: the order of `load`; low ones first.
        copies: what is to be copied after `load`; that cannot fail and cannot be undone.
    """

    path: str
    rank: int

    @property
    def copies(self) -> Copies: ...

    def array_keys(self) -> Iterator[str]:
        """Arrays it needs."""

    def prepare(self, fresh: Fresh) -> None:
        """Make everything ready and remember the present state. Changes nothing; may fail."""

    def load(self) -> None:
        """Run the user's code. May fail, also half-way."""

    def undo(self) -> None:
        """Go back to the state of `prepare`, after `load` ran, or failed."""

    def finish(self) -> None:
        """Let go of what only `undo` needed, and of the copies."""


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
        self.copies: Copies = []
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
            self._before, self._has_before = copied(live), True
        except Exception:  # an object that was never used may have no state to give; `undo` says so if it matters
            live = None
        self._value = fresh.value(self._stored, live)

    def load(self) -> None:
        self._target.load_state_dict(self._value)

    def undo(self) -> None:
        if not self._has_before:
            raise RuntimeError("it had no state to go back to")
        self._target.load_state_dict(self._before)

    def finish(self) -> None:
        self._value = self._before = None


class Transfer:
    """All copies of one restore.

    Args:
        copies: pairs of target and source.

    Raises:
        torch.OutOfMemoryError: a device has no memory for what the copies need; nothing was copied.
    """

    def __init__(self, copies: Copies) -> None:
        self._exact: Copies = []
        self._uploads: Copies = []
        for target, source in copies:
            part = local_part(target)
            (self._uploads if _is_uploadable(part, source) else self._exact).append((part, source))
        self._uploader = Uploader()
        if self._uploads:
            self._uploader.reserve(self._uploads)

    def run(self) -> None:
        """Copy every pair; complete on return, since the sources are scratch memory."""
        with torch.no_grad():
            for target, source in self._exact:
                copy_exact(target, source)
            self._uploader.upload(self._uploads)
        for device in {target.device for target, _ in self._exact if not target.is_cpu}:
            torch.accelerator.synchronize(device)


def _is_uploadable(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether *target* is memory on a CUDA device that takes the bytes of *source* as they are."""
    return (
        target.is_cuda
        and type(target) in PLAIN_KINDS
        and source.is_cpu
        and source.dtype is target.dtype
        and source.shape == target.shape
        and not (target.is_quantized or target.is_conj() or target.is_neg() or is_bytes_only(target.dtype))
    )
