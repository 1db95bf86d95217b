"""Modules: their state dicts under names that do not change when a module is wrapped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["ModuleState", "canonical_names", "read_module"]

StateDict = dict[str, Any]


class ModuleState(NamedTuple):
    """A module's state dict as seen from outside its wrappers.

    Attributes:
        live: the state dict; with the parameters themselves as values where the module allows.
        names: canonical name of each of its keys, in order.
        rename: turns the name of a submodule (not of a tensor) into its canonical one.
    """

    live: StateDict
    names: list[str]
    rename: Callable[[str], str]


def read_module(module: nn.Module) -> Any:
    """``module.state_dict()``, with the parameters themselves instead of detached aliases if possible.

    Optimizer state is keyed by parameter name, and only the parameter itself tells which one it is;
    a second walk over all modules would double the time. A hook that cannot cope with parameters
    (``.numpy()`` refuses them) gets the usual aliases.
    """
    if type(module).state_dict is not nn.Module.state_dict:
        return module.state_dict()
    with torch.no_grad():
        try:
            return module.state_dict(keep_vars=True)
        except Exception:  # whatever a hook raises; if it is not about keep_vars, it raises again
            return module.state_dict()


def canonical_names(module: nn.Module, live: StateDict) -> ModuleState:
    """Names without the components that ``torch.compile`` and data parallelism put in.

    ``_orig_mod.layer.weight`` (compiled) and ``module.layer.weight`` (DDP) are both
    ``layer.weight``, at any depth: a checkpoint of a wrapped module restores into a bare one and back.
    Should two names become equal, all are left as they are.
    """
    names = list(live)
    if not _may_be_wrapped(module, names):
        return ModuleState(live, names, _unchanged)
    table = _module_names(module)

    def rename(name: str) -> str:
        head, tail = name, ""
        while head not in table:  # below a name that is no module: a hook made the key up
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}" if head else f"{last}{tail}"
        return f"{table[head]}{tail}".removeprefix(".")

    renamed = [rename(name) for name in names]
    if len(set(renamed)) != len(renamed):
        return ModuleState(live, names, _unchanged)
    return ModuleState(live, renamed, rename)


def _unchanged(name: str) -> str:
    return name


def _may_be_wrapped(module: nn.Module, names: Iterable[str]) -> bool:
    # One search in one text instead of one per name.
    text = "\n".join(names)
    return "_orig_mod." in text or "module." in text or _inner_name(module) is not None


def _module_names(module: nn.Module) -> dict[str, str]:
    """Canonical name of every submodule by its name; the module itself is ``""``."""
    table = {"": ""}
    wrappers = {"": _inner_name(module)}
    for name, child in module.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, own = name.rpartition(".")
        canonical = table[parent]
        if own != wrappers[parent]:
            canonical = f"{canonical}.{own}" if canonical else own
        table[name] = canonical
        wrappers[name] = _inner_name(child)
    return table


def _inner_name(module: nn.Module) -> str | None:
    """The attribute under which a wrapper keeps the module it wraps; None for anything else."""
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        return "module"
    # Importing dynamo takes seconds; nobody can hold a compiled module who has not.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return "_orig_mod"
    return None
