"""Loads a ``torch.optim.Optimizer``: by parameter name, bit for bit, keeping the live tensors where possible."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from asyncckpt.state.backup import TensorBackup, copied
from asyncckpt.state.fresh import Fresh, owned_copy
from asyncckpt.state.loader import Copies
from asyncckpt.state.match_optimizer import OptimizerMatch
from asyncckpt.state.optimizer import OptimizerView, StoredOptimizer
from asyncckpt.state.stored import StoredCustom, StoredTensor, array_keys
from asyncckpt.state.tensors import is_single_rank_dtensor, local_part, wrap_like
from asyncckpt.state.torch_types import torch_name

__all__ = ["OptimizerLoader"]

Optimizer = torch.optim.Optimizer

_NOWHERE = torch.Size([0])
"""Shape of what stands for a tensor that is not copied yet."""


class OptimizerLoader:
    """Loads one optimizer.

    Torch's ``load_state_dict`` casts floating point state to the type of its parameter, which rounds
    the float32 moments of a bfloat16 parameter, and keeps CPU tensors it is given. So it runs, for its hooks
    and for what subclasses make of it, and what it altered is put right afterwards. An optimizer
    that overrides ``load_state_dict`` has the last word; a changed type is then reported.

    Live state tensors of the right type, shape and device are written into and stay the same objects,
    because CUDA graphs have their addresses. The copies do that.

    Args:
        optimizer: the optimizer.
        view: its present state dict.
        stored: the state to load.
        match: which parameter is which.
        path: where it is.
    """

    rank = 2

    def __init__(
        self, optimizer: Optimizer, view: OptimizerView, stored: StoredOptimizer, match: OptimizerMatch, path: str
    ) -> None:
        self.path = path
        self._optimizer = optimizer
        self._view = view
        self._stored = stored
        self._match = match
        # Asked of the instance, which may have been patched.
        self._is_override = getattr(optimizer.load_state_dict, "__func__", None) is not Optimizer.load_state_dict
        # Nobody but torch sees the values, so they need not be copies, nor even the right values yet.
        self._is_pure = not (
            self._is_override
            or not type(optimizer).__setstate__.__module__.startswith("torch.")
            or optimizer._optimizer_load_state_dict_pre_hooks
            or optimizer._optimizer_load_state_dict_post_hooks
        )
        # Stored and given values of each live parameter and group, by slot or hyperparameter.
        self._wanted: list[dict[Any, Any]] = [{} for _ in view.parameters]
        for slot, values in stored.slots.items():
            for index, position in enumerate(match.parameters):
                label = None if position is None else stored.parameters[position].label
                if label in values:
                    self._wanted[index][slot] = values[label]
        self._value: dict[str, Any] = {}
        self.copies: Copies = []
        self._backup: TensorBackup | None = None
        self._before: _Before | None = None
        self._fresh: Fresh

    def array_keys(self) -> Iterator[str]:
        return array_keys([self._wanted, self._stored.groups, self._stored.extra_state, self._stored.extra])

    # -- prepare -------------------------------------------------------------------------------

    def prepare(self, fresh: Fresh) -> None:
        optimizer, view = self._optimizer, self._view
        self._fresh = fresh
        state: dict[Any, Any] = {}
        for index, wanted in enumerate(self._wanted):
            old = view.state.get(index, {})
            if self._match.parameters[index] is None:
                if old:
                    state[index] = old if self._is_pure else copied(old)
            elif wanted:
                like = view.parameters[index]
                state[index] = {slot: self._give(value, old.get(slot), like) for slot, value in wanted.items()}
        state.update(fresh.value(self._stored.extra_state))
        self._value = {"state": state, "param_groups": self._groups(fresh), **fresh.value(self._stored.extra)}
        self._before = _Before(optimizer)
        if self._is_override:  # torch replaces tensors, an override may write into them
            self._backup = TensorBackup(_tensors([view.state, view.groups]))

    def _give(self, stored: Any, old: Any, parameter: torch.Tensor) -> Any:
        """The value to hand to ``load_state_dict`` for *stored*."""
        if not self._is_pure:
            return self._wrapped(self._fresh.value(stored, old), old, parameter)
        if type(stored) is StoredTensor:
            scratch = self._fresh.scratch.tensor(stored)
            if _is_like(old, stored):
                return old
            given = self._wrapped(scratch, old, parameter)
            # Torch moves it to where it belongs, which is all it is for: moving (and casting) gigabytes of moments
            # from pageable memory takes longer than reading them, and `_settle` would do it again.
            return given if is_single_rank_dtensor(given) else torch.empty(_NOWHERE, dtype=stored.dtype)
        if type(stored) in (list, tuple):
            olds = old if type(old) is type(stored) and len(old) == len(stored) else [None] * len(stored)
            pairs = zip(stored, olds, strict=True)
            return type(stored)(self._give(part, part_old, parameter) for part, part_old in pairs)
        if type(stored) is dict:
            olds = old if isinstance(old, dict) else {}
            return {key: self._give(part, olds.get(key), parameter) for key, part in stored.items()}
        # Torch would cast what may be a tensor to its codec; `_settle` puts the value there.
        return None if type(stored) is StoredCustom else self._fresh.value(stored)

    def _wrapped(self, value: Any, old: Any, parameter: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        like = old if isinstance(old, torch.Tensor) else parameter
        return wrap_like(value, like) if is_single_rank_dtensor(like) and like.shape == value.shape else value

    def _groups(self, fresh: Fresh) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        start = 0
        for live, size, position in zip(self._view.groups, self._view.group_sizes, self._match.groups, strict=True):
            group = dict(live)
            if position is not None:
                # Hyperparameters that only exist here (added since) keep their present values.
                group |= {
                    name: fresh.value(value, live.get(name))
                    for name, value in self._stored.groups[position].items()
                    if name != "param_names"
                }
            numbers = range(start, start + size)
            # For every value torch looks its parameter up here. In a range that is quick; with a list
            # 10,000 parameters take a second. Others may expect the list.
            group["params"] = numbers if self._is_pure else list(numbers)
            start += size
            groups.append(group)
        return groups

    # -- load ----------------------------------------------------------------------------------

    def load(self) -> None:
        self._optimizer.load_state_dict(self._value)
        if self._is_override:
            self._report_changed_types()
            return
        for index, wanted in enumerate(self._wanted):
            loaded = self._optimizer.state.get(self._view.parameters[index])
            if isinstance(loaded, dict):
                self._settle_entries(wanted, loaded, self._view.state.get(index, {}))
        for group, old, position in zip(
            self._optimizer.param_groups, self._view.groups, self._match.groups, strict=True
        ):
            if position is not None:
                self._settle_entries(self._stored.groups[position], group, old)

    def _settle_entries(self, wanted: Mapping[Any, Any], loaded: dict[Any, Any], old: Mapping[Any, Any]) -> None:
        for name, stored in wanted.items():
            if name in loaded and name != "param_names":
                loaded[name] = self._settle(stored, loaded[name], old.get(name))

    def _settle(self, stored: Any, loaded: Any, old: Any) -> Any:
        """What is to stand in the place of *loaded*."""
        if type(stored) is StoredTensor:
            return self._settle_tensor(stored, loaded, old) if isinstance(loaded, torch.Tensor) else loaded
        if type(stored) in (list, tuple) and type(loaded) is type(stored) and len(loaded) == len(stored):
            olds = old if type(old) is type(stored) and len(old) == len(stored) else [None] * len(stored)
            return type(stored)(map(self._settle, stored, loaded, olds))
        if type(stored) is dict and isinstance(loaded, dict):
            self._settle_entries(stored, loaded, old if isinstance(old, dict) else {})
            return loaded
        if type(stored) is StoredCustom:
            return self._fresh.value(stored) if self._is_pure else loaded
        # Torch takes texts for lists of values.
        if isinstance(loaded, torch.Tensor) or not (self._is_pure or type(stored) in (str, bytes)):
            return loaded
        return self._fresh.value(stored)

    def _settle_tensor(self, stored: StoredTensor, loaded: torch.Tensor, old: Any) -> torch.Tensor:
        scratch = self._fresh.scratch.tensor(stored)
        exact: torch.Tensor
        if self._is_pure:
            exact = scratch
        elif loaded.dtype is stored.dtype:
            exact = loaded  # a hook may have changed it
        else:
            exact = self._fresh.value(stored, loaded)
        if isinstance(old, torch.Tensor) and _is_like(old, stored):
            if old.device == loaded.device:
                self.copies.append((old, exact))
                return old
        elif self._is_pure and loaded.shape == _NOWHERE:
            target = torch.empty(stored.shape, dtype=stored.dtype, device=loaded.device)
            self.copies.append((target, exact))
            return target
        elif loaded.dtype is stored.dtype and not _share_memory(loaded, scratch):
            return loaded
        # `loaded` may be the scratch tensor itself: torch keeps what already has the right type and device.
        return wrap_like(owned_copy(exact, loaded.device), loaded)

    def _report_changed_types(self) -> None:
        for index, wanted in enumerate(self._wanted):
            loaded = self._optimizer.state.get(self._view.parameters[index], {})
            for slot, stored in wanted.items():
                value = loaded.get(slot) if isinstance(loaded, dict) else None
                if type(stored) is StoredTensor and isinstance(value, torch.Tensor) and value.dtype is not stored.dtype:
                    warnings.warn(
                        f"{type(self._optimizer).__name__}.load_state_dict turned {self.path}/{slot} from "
                        f"{torch_name(stored.dtype)} into {torch_name(value.dtype)}; the resumed run is not exact",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return

    # -- undo and finish -----------------------------------------------------------------------

    def undo(self) -> None:
        if self._before is not None:
            self._before.restore(self._optimizer)
        if self._backup is not None:
            self._backup.restore()

    def finish(self) -> None:
        self.copies, self._value, self._backup, self._before = [], {}, None, None


class _Before:
    """State and groups of an optimizer: the objects, and what is in them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = optimizer.state
        self._groups = optimizer.param_groups
        self._entries = {key: dict(value) if isinstance(value, dict) else value for key, value in self._state.items()}
        self._members = [(group, dict(group)) for group in self._groups]

    def restore(self, optimizer: Optimizer) -> None:
        self._state.clear()
        self._state.update(self._entries)
        for group, members in self._members:
            group.clear()
            group.update(members)
        self._groups[:] = [group for group, _ in self._members]
        optimizer.state = self._state
        optimizer.param_groups = self._groups


def _is_like(old: Any, stored: StoredTensor) -> bool:
    return (
        isinstance(old, torch.Tensor)
        and old.dtype is stored.dtype
        and old.shape == stored.shape
        and not old.is_inference()
    )


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return local_part(one).untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
