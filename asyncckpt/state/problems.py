"""Where checkpoint and live state differ, collected before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy

from asyncckpt.errors import StateMismatchError
from asyncckpt.model import Mismatch
from asyncckpt.state.arrays import Array
from asyncckpt.state.stored import StoredArray, StoredQuantized, StoredTensor
from asyncckpt.state.torch_types import ZARR_NAMES

__all__ = ["Problems", "describe", "why_array_differs", "why_tensor_differs"]

_SHOWN = 10


class Problems:
    """Differences by kind; each is a path, and a reason where the path does not say it all."""

    def __init__(self) -> None:
        self._missing: dict[str, str] = {}
        self._unexpected: dict[str, str] = {}
        self._mismatched: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._missing or self._unexpected or self._mismatched)

    def missing(self, path: str) -> None:
        """*path* is in the state, not in the checkpoint."""
        self._missing[path] = path

    def unexpected(self, path: str) -> None:
        """*path* is in the checkpoint, and the state has no place for it."""
        self._unexpected[path] = path

    def mismatched(self, path: str, why: str) -> None:
        """*path* is in both and cannot be loaded."""
        self._mismatched[path] = f"{path} ({why})"

    def extend(self, other: Problems) -> None:
        """Add those of *other*."""
        self._missing.update(other._missing)
        self._unexpected.update(other._unexpected)
        self._mismatched.update(other._mismatched)

    def mismatch(self) -> Mismatch:
        """The paths."""
        return Mismatch(tuple(self._missing), tuple(self._unexpected), tuple(self._mismatched))

    def error(self) -> StateMismatchError:
        """All of it as an error."""
        parts = [
            _sentence("missing from the checkpoint", self._missing),
            _sentence("in the checkpoint only", self._unexpected),
            _sentence("different", self._mismatched),
        ]
        return StateMismatchError(
            f"the checkpoint does not fit the state, nothing was changed; {'; '.join(filter(None, parts))}. "
            "Load what fits with strict=False, or a part with only=",
            missing=list(self._missing),
            unexpected=list(self._unexpected),
            mismatched=list(self._mismatched),
        )


def _sentence(what: str, entries: dict[str, str]) -> str:
    if not entries:
        return ""
    shown = ", ".join(list(entries.values())[:_SHOWN])
    rest = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{len(entries)} {what}: {shown}{rest}"


def why_tensor_differs(live: torch.Tensor, stored: Any) -> str | None:
    """Why *stored* cannot be copied into *live*; None if it can."""
    if type(stored) is StoredTensor:
        if live.dtype is not stored.dtype or live.is_quantized:
            return _versus(stored, live)
    elif type(stored) is not StoredQuantized or not _is_quantized_alike(live, stored):
        return _versus(stored, live)
    if is_lazy(live):
        return None  # takes any shape
    shape = stored.shape if type(stored) is StoredTensor else stored.values.shape
    if live.layout is not torch.strided or live.is_nested or live.shape != shape:
        return _versus(stored, live)
    if live.is_meta:
        return "here on the meta device, which holds no values"
    if 0 in live.stride() and any(step == 0 and n > 1 for step, n in zip(live.stride(), live.shape, strict=True)):
        return "here an expanded tensor, whose elements share memory"
    return None


def _is_quantized_alike(live: torch.Tensor, stored: StoredQuantized) -> bool:
    if live.dtype in ZARR_NAMES or live.dtype is not stored.dtype or not live.is_quantized:
        return False
    if stored.axis is None:
        return live.qscheme() == torch.per_tensor_affine
    return live.qscheme() == torch.per_channel_affine and live.q_per_channel_axis() == stored.axis


def why_array_differs(live: Array, stored: Any) -> str | None:
    """Why *stored* cannot be copied into *live*; None if it can."""
    if type(stored) is not StoredArray or live.dtype.name != stored.dtype or live.shape != stored.shape:
        return f"the checkpoint has {describe(stored)}, here it is numpy {live.dtype} {list(live.shape)}"
    return None if live.flags.writeable else "here a read-only array"


def describe(stored: Any) -> str:
    """What *stored* is, in a few words."""
    if type(stored) in (StoredTensor, StoredArray, StoredQuantized):
        return str(stored)
    return "None" if stored is None else f"a value of type {type(stored).__name__.removeprefix('Stored').lower()}"


def _versus(stored: Any, live: torch.Tensor) -> str:
    if is_lazy(live) or live.is_nested:
        here = f"{str(live.dtype).removeprefix('torch.')} {type(live).__name__}"
    else:
        here = f"{str(live.dtype).removeprefix('torch.')} {list(live.shape)}"
    layout = "" if live.layout is torch.strided else f" ({live.layout})"
    return f"the checkpoint has {describe(stored)}, here it is {here}{layout}"
