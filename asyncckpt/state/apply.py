"""Puts a checkpoint into live state, or into a dict of fresh values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import InvalidOptionError
from asyncckpt.format.tree import Node
from asyncckpt.model import Mismatch
from asyncckpt.state.fresh import Fresh, ScratchTensors
from asyncckpt.state.loader import GENERATORS, Copies, Loader, Transfer
from asyncckpt.state.merge import MergedTuple, Part, Take
from asyncckpt.state.planner import Planner
from asyncckpt.state.selection import Only, Selection
from asyncckpt.state.stored import array_keys, decode_tree

__all__ = ["ApplyPlan", "LoadPlan", "plan_apply"]


class ApplyPlan:
    """A comparison that found a checkpoint fit to be loaded. Made by `plan_apply`, executed once.

    Attributes:
        keys: arrays that `execute` needs.
        mismatch: what will not be loaded; empty unless ``strict=False``.
    """

    def __init__(self, state: Mapping[str, Any], parts: Mapping[str, Part], planner: Planner) -> None:
        self._state = state
        self._parts = parts
        self._planner = planner
        self.mismatch: Mismatch = planner.problems.mismatch()
        self.keys: frozenset[str] = frozenset(self._needed())

    def __repr__(self) -> str:
        return f"<ApplyPlan of {len(self.keys)} arrays for {', '.join(self._parts) or 'nothing'}>"

    def _needed(self) -> set[str]:
        keys = {key for loader in self._planner.loaders for key in loader.array_keys()}
        keys.update(key for _, stored in self._planner.tensors for key in array_keys(stored))
        keys.update(stored.key for _, stored in self._planner.arrays)
        for part in self._parts.values():
            keys.update(key for stored in part.taken() for key in array_keys(stored))
        return keys

    def execute(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load everything, or nothing.

        Whatever may fail comes first: checks, memory, and the user's own code (``load_state_dict`` of
        objects, hooks, subclasses), which is undone if any of it raises. Copies into parameters,
        moments and plain tensors come last and cannot fail; on return they are complete, whatever
        stream the caller uses. Random generators are set after all other objects, so that nothing
        draws from them.

        Args:
            tensors: the arrays of `keys`, on the CPU. Nothing refers to their memory afterwards.

        Raises:
            CorruptCheckpointError: an array is not what the tree says.
            Exception: what the user's code raised, with a note on what was being loaded.
        """
        scratch = ScratchTensors(tensors)
        fresh = Fresh(scratch, copy=True, to_devices=True)
        copies: Copies = [(live, fresh.source(stored)) for live, stored in self._planner.tensors]
        arrays = [(live, scratch.array(stored)) for live, stored in self._planner.arrays]
        updates: list[Callable[[], None]] = []
        values = {name: part.evaluate(fresh, updates) for name, part in self._parts.items()}
        loaders = sorted(self._planner.loaders, key=lambda loader: loader.rank)
        _prepare_all(loaders, fresh)
        transfer = _load_all(loaders, copies)
        transfer.run()
        for loader in loaders:
            loader.finish()
        for target, source in arrays:
            np.copyto(target, source)
        for update in updates:
            update()
        self._rebind(values)

    def _rebind(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is not self._state[name]:
                assert isinstance(self._state, MutableMapping)  # plan_apply saw to it
                self._state[name] = value


def _prepare_all(loaders: list[Loader], fresh: Fresh) -> None:
    # Generators, which are last, first: asking other objects for their present state may draw from them.
    prepared: list[Loader] = []
    try:
        for loader in reversed(loaders):
            loader.prepare(fresh)
            prepared.append(loader)
    except BaseException as error:
        _undo_all([loader for loader in prepared if loader.rank == GENERATORS], error)
        raise


def _load_all(loaders: list[Loader], copies: Copies) -> Transfer:
    """Load everything, and take the memory for all copies: *copies* and those of the loaders."""
    begun: list[Loader] = []
    try:
        for loader in loaders:
            begun.append(loader)
            loader.load()
        return Transfer([*copies, *(pair for loader in loaders for pair in loader.copies)])
    except BaseException as error:
        what = repr(begun[-1].path) if begun else "tensors"
        error.add_note(f"asyncckpt: while restoring {what}; what had been loaded was put back")
        # Generators were taken down before anything else could draw from them, and undoing may draw, too.
        generators = [loader for loader in loaders if loader.rank == GENERATORS]
        _undo_all([*reversed([loader for loader in begun if loader.rank != GENERATORS]), *generators], error)
        raise


def _undo_all(loaders: list[Loader], error: BaseException) -> None:
    for loader in loaders:
        try:
            loader.undo()
        except Exception as second:  # the first error is the one to report
            error.add_note(f"asyncckpt: {loader.path!r} could not be put back: {second!r}")


def plan_apply(state: Mapping[str, Any], tree: Node, only: Only = None, strict: bool = True) -> ApplyPlan:
    """Compare *state* with a checkpoint. Nothing is changed.

    Objects, tensors, arrays, dicts and lists of *state* will be updated in place; immutable values are
    replaced in the container they are in, at the top in *state* itself.

    Args:
        state: live state, by name.
        tree: the tree `capture` made.
        only: glob patterns over ``/``-joined paths, such as ``"model/*"``; the rest stays as it is.
        strict: whether every difference is an error. Otherwise what fits is loaded, and
            `ApplyPlan.mismatch` has the rest.

    Raises:
        StateMismatchError: they differ in names, shapes or types.
        InvalidOptionError: *only* matches nothing, or a part of something that can only be loaded
            whole; or *state* is read-only and has values to replace.
        CorruptCheckpointError: *tree* is malformed.
    """
    selection = Selection(only)
    stored = decode_tree(tree)
    selection.check(stored)
    planner = Planner(selection, strict=strict)
    parts = planner.plan(state, stored)
    if strict and planner.problems:
        raise planner.problems.error()
    fixed = [name for name, part in parts.items() if isinstance(part, (Take, MergedTuple))]
    if fixed and not isinstance(state, MutableMapping):
        raise InvalidOptionError(f"the state is read-only, so {fixed[0]!r} cannot be restored; pass a dict")
    return ApplyPlan(state, parts, planner)


class LoadPlan:
    """What of a checkpoint is to be loaded without live objects; decoded once, for the keys and for the values.

    Args:
        tree: the tree `capture` made.
        only: glob patterns; entries of dicts that no pattern selects are left out.

    Raises:
        InvalidOptionError: *only* matches nothing.
        CorruptCheckpointError: *tree* is malformed.
    """

    def __init__(self, tree: Node, only: Only = None) -> None:
        selection = Selection(only)
        stored = decode_tree(tree)
        selection.check(stored)
        self._stored: dict[str, Any] = selection.prune(stored)

    @property
    def keys(self) -> frozenset[str]:
        """Arrays that `build` needs."""
        return frozenset(array_keys(self._stored))

    def build(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The saved state without live objects to put it into.

        Objects come as their state dicts: a module as an ``OrderedDict``, an optimizer in torch's form
        (numbered parameters) with one more entry, ``"param_fqns"``, that has their names. Both can be given
        to ``load_state_dict``. What shared memory when it was saved shares it again. Tensors are on the CPU.

        Args:
            tensors: the arrays of `keys`. The result keeps their memory.

        Raises:
            CorruptCheckpointError: *tensors* are not what the tree says.
            UnsupportedStateError: a type that is not registered here.
        """
        fresh = Fresh(ScratchTensors(tensors), copy=False, to_devices=False)
        state: dict[str, Any] = fresh.value(self._stored)
        return state

    def __repr__(self) -> str:
        return f"<LoadPlan of {', '.join(self._stored)}>"
