"""Names of parameters: which module of the state owns them, and what it calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from asyncckpt.state.modules import ModuleState, canonical_names

__all__ = ["Owner", "ParameterNames"]


class Owner(NamedTuple):
    """Where a parameter lives.

    Attributes:
        module: path of its module in the state, ``model``.
        name: its canonical name there, ``transformer.h.0.attn.weight``.
    """

    module: str
    name: str


class ParameterNames:
    """Looks parameters up by identity. The first module that has a parameter owns it."""

    def __init__(self) -> None:
        self._modules: list[tuple[str, nn.Module]] = []
        self._read: list[tuple[str, ModuleState]] = []
        self._table: dict[int, Owner] | None = None
        self._has_walked = False

    def add(self, path: str, module: nn.Module, state: ModuleState | None) -> None:
        """Let *module* take part; *state* is what was read from it, if it was."""
        self._modules.append((path, module))
        if state is not None:
            self._read.append((path, state))

    def find(self, parameters: Iterable[torch.Tensor]) -> list[Owner | None]:
        """The owner of each parameter, None for those no module has."""
        wanted = list(parameters)
        table = self._tensors_of_state_dicts()
        if not self._has_walked and any(id(parameter) not in table for parameter in wanted):
            # State dicts of detached aliases, or with the parameter left out: ask the modules themselves.
            self._walk(table)
        return [table.get(id(parameter)) for parameter in wanted]

    def _tensors_of_state_dicts(self) -> dict[int, Owner]:
        if self._table is None:
            self._table = {}
            for path, state in self._read:
                _enter(self._table, path, zip(state.names, state.live.values(), strict=True))
        return self._table

    def _walk(self, table: dict[int, Owner]) -> None:
        self._has_walked = True
        for path, module in self._modules:
            parameters: Mapping[str, Any] = dict(module.named_parameters(remove_duplicate=False))
            names = canonical_names(module, dict(parameters)).names
            _enter(table, path, zip(names, parameters.values(), strict=True))


def _enter(table: dict[int, Owner], path: str, named: Iterable[tuple[str, Any]]) -> None:
    for name, value in named:
        if id(value) not in table:
            table[id(value)] = Owner(path, name)
