"""Reduces every kind of tensor to a plain one that can be copied byte for byte, or refuses it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.state.torch_types import is_bytes_only

__all__ = ["PLAIN_KINDS", "copy_exact", "is_single_rank_dtensor", "local_part", "plain_tensor", "wrap_like"]

PLAIN_KINDS = frozenset({torch.Tensor, nn.Parameter})
"""Exact types that are what they seem."""


def plain_tensor(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """*tensor* as a strided, detached ``torch.Tensor`` with memory and without conj or neg bit.

    Shares memory with *tensor* unless a conj or neg bit had to be resolved. Quantised tensors stay
    quantised.

    Args:
        tensor: any tensor.
        path: where it is in the state, for errors.

    Raises:
        UnsupportedStateError: sparse, nested, meta, lazy, distributed over several ranks, or a
            wrapper subclass whose values are somewhere else.
    """
    kind = type(tensor)
    if is_lazy(tensor):
        raise _refuse(tensor, path, "is not initialised yet; run the module once before saving")
    if is_single_rank_dtensor(tensor):
        return plain_tensor(local_part(tensor), path)
    # A class that intercepts operators keeps its values elsewhere; its own memory is empty or partial.
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise _refuse(tensor, path, _why_wrapped(tensor))
    if tensor.layout is not torch.strided:
        raise _refuse(tensor, path, f"has the layout {tensor.layout}; save its dense form or its parts")
    if tensor.is_nested:
        raise _refuse(tensor, path, "is nested; save its values and offsets")
    if tensor.is_meta:
        raise _refuse(tensor, path, "is on the meta device and has no values; materialise it first")
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise _refuse(tensor, path, "has no memory: its storage was freed")
    plain = tensor.detach()
    if kind not in PLAIN_KINDS:
        plain = plain.as_subclass(torch.Tensor)
    return plain.resolve_conj().resolve_neg()


def _refuse(tensor: torch.Tensor, path: str, why: str) -> UnsupportedStateError:
    kind = type(tensor)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return UnsupportedStateError(f"{path} is a {name} that {why}", key=path, type=name)


def _why_wrapped(tensor: torch.Tensor) -> str:
    dtensor = _dtensor_class()
    if dtensor is not None and isinstance(tensor, dtensor):
        return "is distributed over several ranks, which format 1 does not store; gather it first"
    return "keeps its values in other tensors; save those, or register the class with asyncckpt.register_type"


def _dtensor_class() -> Any:
    # Importing it takes long; nobody can hold a DTensor who has not.
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_single_rank_dtensor(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is a DTensor whose only rank is this one, so that its local part is all of it."""
    if type(tensor) in PLAIN_KINDS:
        return False
    dtensor = _dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor) and tensor.device_mesh.size() == 1


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside a DTensor of one rank; any other tensor itself."""
    if not is_single_rank_dtensor(tensor):
        return tensor
    distributed: Any = tensor
    with torch.no_grad():
        local: torch.Tensor = distributed.to_local()
    return local


def wrap_like(value: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """*value* as a DTensor when *live* is one, else *value*: the two kinds do not mix in torch's operators."""
    if not is_single_rank_dtensor(live) or is_single_rank_dtensor(value):
        return value
    like: Any = live
    wrapped: torch.Tensor = _dtensor_class().from_local(
        value.to(like.device), like.device_mesh, like.placements, run_check=False
    )
    return wrapped


def copy_exact(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy *source* into *target*, same type and shape, bit for bit, on any devices.

    Call it under ``torch.no_grad()``. From pinned memory it does not wait for the device: synchronise
    before the memory of *source* is used again.
    """
    target = local_part(target)
    if is_bytes_only(target.dtype) and not target.is_quantized:
        target, source = target.view(torch.uint8), source.view(torch.uint8)
    non_blocking = not target.is_cpu and source.is_pinned()
    if target.is_inference():
        with torch.inference_mode():
            target.copy_(source, non_blocking=non_blocking)
    else:
        target.copy_(source, non_blocking=non_blocking)
