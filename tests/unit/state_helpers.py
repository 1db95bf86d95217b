"""Saving and restoring without a disk between, and comparing states bit for bit."""

from __future__ import annotations

import random
import struct
from collections import deque
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.model import Mismatch
from asyncckpt.state.apply import LoadPlan, plan_apply
from asyncckpt.state.capture import capture
from asyncckpt.state.tensors import plain_tensor

Saved = tuple[Any, dict[str, torch.Tensor]]
"""A tree as read from a header, and copies of the arrays by key."""


def save(state: dict[str, Any]) -> Saved:
    """What a checkpoint of *state* would hold; the tree passes through the JSON of a header."""
    captured = capture(state)
    assert len({leaf.key for leaf in captured.leaves}) == len(captured.leaves)
    tree = msgspec.json.decode(msgspec.json.encode(captured.tree))
    return tree, {leaf.key: leaf.tensor.cpu().clone(memory_format=torch.contiguous_format) for leaf in captured.leaves}


def build_state(tree: Any, tensors: dict[str, torch.Tensor], only: Any = None) -> dict[str, Any]:
    """What `load` gives."""
    return LoadPlan(tree, only).build(tensors)


def select_keys(tree: Any, only: Any = None) -> frozenset[str]:
    """Arrays that `load` reads."""
    return LoadPlan(tree, only).keys


def restore(state: dict[str, Any], saved: Saved, **options: Any) -> Mismatch:
    """Restore, then overwrite the scratch memory: whoever kept it now holds nonsense."""
    tree, tensors = saved
    plan = plan_apply(state, tree, **options)
    scratch = {key: tensors[key].clone() for key in plan.keys}
    plan.execute(scratch)
    for tensor in scratch.values():
        tensor.view(torch.uint8).fill_(0xA5) if tensor.dim() else tensor.fill_(1)
    return plan.mismatch


def fingerprint(value: Any) -> Any:
    """Everything about *value* that a restore must keep, comparable with ``==``; types and bits included."""
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, torch.optim.Optimizer):
        return _of_optimizer(value)
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        return (type(value), value.dtype, value.shape, value.tobytes())
    if isinstance(value, float):
        return (float, struct.pack(">d", value))
    if isinstance(value, complex):
        return (complex, struct.pack(">dd", value.real, value.imag))
    if isinstance(value, dict):
        metadata = getattr(value, "_metadata", None)
        items = [(fingerprint(key), fingerprint(part)) for key, part in value.items()]
        return (type(value), items, None if metadata is None else fingerprint(dict(metadata)))
    if isinstance(value, list | tuple | deque):
        return (type(value), list(map(fingerprint, value)), getattr(value, "maxlen", None))
    if isinstance(value, ac.RNG):
        return generators()
    if hasattr(value, "load_state_dict"):
        return (type(value), fingerprint(value.state_dict()))
    return (type(value), value)


def generators() -> Any:
    """State of the global random generators."""
    return (random.getstate(), fingerprint(np.random.get_state(legacy=False)), _of_tensor(torch.get_rng_state()))


def _of_tensor(tensor: torch.Tensor) -> Any:
    flat = plain_tensor(tensor, "").contiguous().reshape(-1)
    return ("tensor", tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def _of_module(module: nn.Module) -> Any:
    parts: list[Any] = []
    for name, part in module.named_modules():
        tensors = {**part._parameters, **part._buffers}
        extra = type(part).get_extra_state is not nn.Module.get_extra_state
        parts.append(
            (
                name,
                type(part),
                [(key, type(tensor), id(tensor), _of_any(tensor)) for key, tensor in tensors.items()],
                fingerprint(part.get_extra_state()) if extra else None,
            )
        )
    return parts


def _of_any(tensor: torch.Tensor | None) -> Any:
    lazy = tensor is not None and nn.parameter.is_lazy(tensor)
    return "lazy" if lazy else None if tensor is None else _of_tensor(tensor)


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"count": len(group["params"])}
        for group in optimizer.param_groups
    ]
    known = set(map(id, parameters))
    others = {key: value for key, value in optimizer.state.items() if id(key) not in known}
    # A parameter without state and one with an empty dict are the same to every optimizer.
    state = [fingerprint(dict(optimizer.state[key])) if optimizer.state.get(key) else None for key in parameters]
    return (list(map(id, parameters)), state, fingerprint(others), [_sorted(group) for group in groups])


def _sorted(group: dict[str, Any]) -> Any:
    return [(name, fingerprint(group[name])) for name in sorted(group)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, width: int = 4) -> None:
    """A few steps on random data from torch's global generator."""
    for _ in range(steps):
        data = torch.randn(3, width, dtype=next(model.parameters()).dtype)
        optimizer.step(partial(_loss, model, optimizer, data))


def _loss(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss: torch.Tensor = model(data).float().square().mean()
    loss.backward()
    return loss
