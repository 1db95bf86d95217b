"""Compares live state and checkpoint, and decides what each object needs. Changes nothing."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt.errors import InvalidOptionError
from asyncckpt.state.arrays import Array
from asyncckpt.state.live import find_modules, holds_objects
from asyncckpt.state.load_module import ModuleLoader, compare_module, runs_own_code, would_be_cast
from asyncckpt.state.load_optimizer import OptimizerLoader
from asyncckpt.state.loader import GENERATORS, OBJECTS, Loader, ObjectLoader
from asyncckpt.state.match_optimizer import match_optimizer
from asyncckpt.state.merge import REFILLABLE, Keep, MergedDict, MergedList, MergedTuple, Part, Refill, Take
from asyncckpt.state.modules import ModuleState, canonical_names, read_module
from asyncckpt.state.optimizer import OptimizerView, StoredOptimizer, view_optimizer
from asyncckpt.state.param_names import ParameterNames
from asyncckpt.state.problems import Problems, describe, why_array_differs, why_tensor_differs
from asyncckpt.state.registry import codec_for
from asyncckpt.state.rng import RNG
from asyncckpt.state.selection import Selection
from asyncckpt.state.stateful import Stateful, is_stateful
from asyncckpt.state.stored import StoredArray, StoredCustom, StoredQuantized, StoredTensor

__all__ = ["Planner"]

_DICTS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, tuple)
_TENSORS = (StoredTensor, StoredArray, StoredQuantized)


class Planner:
    """Walks live state and checkpoint together.

    Attributes:
        problems: what does not fit.
        loaders: objects that load themselves.
        tensors: live tensors to write into, and what.
        arrays: live numpy arrays to write into, and what.
    """

    def __init__(self, selection: Selection, *, strict: bool) -> None:
        self.problems = Problems()
        self.loaders: list[Loader] = []
        self.tensors: list[tuple[torch.Tensor, StoredTensor | StoredQuantized]] = []
        self.arrays: list[tuple[Array, StoredArray]] = []
        self._selection = selection
        self._strict = strict
        self._module_states: dict[str, ModuleState] = {}
        # As in the encoder: the module an optimizer needs may come after it.
        self._optimizers: list[Callable[[ParameterNames], None]] = []

    def plan(self, state: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Part]:
        """What each entry of *state* becomes; those the checkpoint lacks are left out."""
        parts = self._visit_entries(state, stored, "")
        for name, value in stored.items():
            if name not in state and self._selection.extent(value, name) != "none":
                self.problems.unexpected(name)
        if self._optimizers:
            names = self._parameter_names(state)
            for plan in self._optimizers:
                plan(names)
        return parts

    def _parameter_names(self, state: Mapping[str, Any]) -> ParameterNames:
        """From all modules, in the order of the state: also those that ``only=`` excludes have names."""
        names = ParameterNames()
        for path, module in find_modules(state):
            names.add(path, module, self._module_states.get(path))
        return names

    def _visit_entries(self, live: Mapping[Any, Any], stored: Mapping[Any, Any], path: str) -> dict[Any, Part]:
        parts: dict[Any, Part] = {}
        prefix = f"{path}/" if path else ""
        for key, value in live.items():
            below = f"{prefix}{key}"
            if key not in stored:
                if below in self._selection:
                    self.problems.missing(below)
            elif self._selection.is_everything or self._selection.extent(stored[key], below) != "none":
                parts[key] = self._visit(value, stored[key], below)
        return parts

    def _visit(self, live: Any, stored: Any, path: str) -> Part:
        if type(stored) is StoredCustom and _is_registered(live):
            return Take(stored)
        if isinstance(live, torch.Tensor):
            return self._visit_tensor(live, stored, path)
        if isinstance(live, np.ndarray):
            return self._visit_array(live, stored, path)
        if is_stateful(live):
            self._visit_object(live, stored, path)
            return Keep(live)
        return self._visit_value(live, stored, path)

    def _visit_tensor(self, live: torch.Tensor, stored: Any, path: str) -> Part:
        why = why_tensor_differs(live, stored)
        if why is None and is_lazy(live):
            why = "here a lazy parameter, which only its module can load"
        if why is None:
            self.tensors.append((live, stored))
        else:
            self.problems.mismatched(path, why)
        return Keep(live)

    def _visit_array(self, live: Array, stored: Any, path: str) -> Part:
        why = why_array_differs(live, stored)
        if why is None:
            self.arrays.append((live, stored))
        else:
            self.problems.mismatched(path, why)
        return Keep(live)

    # -- plain values and containers -----------------------------------------------------------

    def _visit_value(self, live: Any, stored: Any, path: str) -> Part:
        kind = type(live)
        if kind in _DICTS and type(stored) is StoredCustom and stored.name == "collections:defaultdict":
            stored = stored.value.get("items") if isinstance(stored.value, dict) else None
        elif kind in _DICTS and type(stored) is StoredOptimizer:
            stored = stored.standard()
        if kind in _DICTS and isinstance(stored, dict):
            return self._visit_dict(live, stored, path)
        if kind in _SEQUENCES and type(stored) in _SEQUENCES and (kind is type(stored) or holds_objects(live)):
            elements = self._visit_elements(live, stored, path)
            return MergedList(live, elements) if kind is list else MergedTuple(live, elements)
        if kind in REFILLABLE and type(stored) is StoredCustom:
            return Refill(live, stored)
        if live is not None and (_is_container(live) != _is_container(stored) or holds_objects(live)):
            self.problems.mismatched(path, f"the checkpoint has {describe(stored)}, here it is a {kind.__qualname__}")
            return Keep(live)
        return Take(stored)

    def _visit_dict(self, live: dict[Any, Any], stored: dict[Any, Any], path: str) -> Part:
        parts = self._visit_entries(live, stored, path)
        prefix = f"{path}/" if path else ""
        merged: dict[Any, Part] = {}
        for key, value in stored.items():
            if key in live:
                merged[key] = parts.get(key, Keep(live[key]))
            elif self._selection.extent(value, f"{prefix}{key}") != "none":
                merged[key] = Take(value)
        merged |= {key: Keep(value) for key, value in live.items() if key not in stored}
        return MergedDict(live, merged)

    def _visit_elements(
        self, live: list[Any] | tuple[Any, ...], stored: list[Any] | tuple[Any, ...], path: str
    ) -> list[Part]:
        """A list is taken as it was saved, longer or shorter; only live objects must not get lost."""
        pairs = enumerate(zip(live, stored, strict=False))
        parts = [self._visit(own, there, f"{path}/{index}") for index, (own, there) in pairs]
        parts += [Take(there) for there in stored[len(live) :]]
        for index, own in enumerate(live[len(stored) :], len(stored)):
            if holds_objects(own):
                self.problems.missing(f"{path}/{index}")
                parts.append(Keep(own))
        return parts

    # -- objects -------------------------------------------------------------------------------

    def _visit_object(self, live: Stateful, stored: Any, path: str) -> None:
        if isinstance(live, nn.Module):
            state_dict = read_module(live)
            if isinstance(state_dict, dict) and set(map(type, state_dict)) <= {str}:
                self._visit_module(live, canonical_names(live, state_dict), stored, path)
                return
        if self._selection.extent(stored, path) == "some":
            raise InvalidOptionError(
                f"only= selects a part of {path}, a {type(live).__qualname__}; it can only be restored whole"
            )
        if isinstance(live, torch.optim.Optimizer):
            if not isinstance(stored, (StoredOptimizer, dict)):
                self.problems.mismatched(path, f"the checkpoint has {describe(stored)}, here it is an optimizer")
                return
            view = view_optimizer(live, live.state_dict())
            if view is not None and type(stored) is StoredOptimizer:
                self._optimizers.append(lambda names: self._visit_optimizer(live, view, stored, path, names))
                return
        self.loaders.append(ObjectLoader(live, stored, path, GENERATORS if isinstance(live, RNG) else OBJECTS))

    def _visit_module(self, module: nn.Module, state: ModuleState, stored: Any, path: str) -> None:
        self._module_states[path] = state
        if not isinstance(stored, dict):
            self.problems.mismatched(path, f"the checkpoint has {describe(stored)}, here it is a module")
            return
        own_code = runs_own_code(module, state.live)
        entries, problems = compare_module(state, stored, path, self._selection)
        # Its hooks may rename or convert what is stored; let it judge.
        is_judge = (
            self._strict
            and own_code
            and bool(problems)
            and self._selection.extent(stored, path) == "all"
            and not would_be_cast(state, stored)
        )
        if is_judge:
            known: dict[str, str] = dict(zip(state.names, state.live, strict=True))
            entries = {known.get(str(name), str(name)): value for name, value in stored.items()}
        else:
            self.problems.extend(problems)
        metadata = getattr(stored, "_metadata", None)
        self.loaders.append(ModuleLoader(module, state, entries, metadata, path, strict=is_judge, own_code=own_code))

    def _visit_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        view: OptimizerView,
        stored: StoredOptimizer,
        path: str,
        names: ParameterNames,
    ) -> None:
        match, problems = match_optimizer(view, names.find(view.parameters), stored, path)
        self.problems.extend(problems)
        self.loaders.append(OptimizerLoader(optimizer, view, stored, match, path))


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, StoredOptimizer, *_TENSORS)) or type(value) in _SEQUENCES


def _is_registered(live: Any) -> bool:
    """Whether a codec makes a new object of it, although it may look like one that loads itself."""
    kind = type(live)
    return kind not in _DICTS and kind not in REFILLABLE and codec_for(kind) is not None
