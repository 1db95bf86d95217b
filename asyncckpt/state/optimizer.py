"""Optimizers: their state by slot and parameter name, instead of by position.

``optimizer.state_dict()`` numbers the parameters in the order in which they were handed over, so a
reordered model loads the moments of one layer into another of the same shape, silently. Here each
value is stored under ``<slot>/<parameter name>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from asyncckpt.state.param_names import Owner

__all__ = [
    "RESERVED",
    "Label",
    "OptimizerView",
    "StoredOptimizer",
    "StoredParameter",
    "labels_of",
    "parameters_from_nodes",
    "parameters_to_nodes",
    "transpose",
    "view_optimizer",
]

StateDict = dict[str, Any]
RESERVED = ("param_groups", "extra_state", "extra")
"""Key components beside the slots; a slot cannot be called so."""
Label = str | int
"""What a parameter is called inside one optimizer: its name, or its index when no module owns it."""


class StoredParameter(NamedTuple):
    """One parameter of an optimizer in a checkpoint.

    Attributes:
        label: its key in every slot.
        owner: module and name; None when no module of the state owned it.
        shape: its shape.
    """

    label: Label
    owner: Owner | None
    shape: tuple[int, ...]


class StoredOptimizer(NamedTuple):
    """An optimizer in a checkpoint; tensors in it are placeholders until they are read.

    Attributes:
        parameters: all of them, group after group.
        group_sizes: how many parameters each group has.
        groups: hyperparameters of each group.
        slots: slot name to label to value.
        extra_state: entries of ``state`` that belong to no parameter.
        extra: other entries of the state dict.
    """

    parameters: tuple[StoredParameter, ...]
    group_sizes: tuple[int, ...]
    groups: list[dict[str, Any]]
    slots: dict[Any, dict[Label, Any]]
    extra_state: dict[Any, Any]
    extra: dict[str, Any]

    def positions(self) -> list[list[int]]:
        """Positions of the parameters of each group."""
        positions: list[list[int]] = []
        start = 0
        for size in self.group_sizes:
            positions.append(list(range(start, start + size)))
            start += size
        return positions

    def standard(self) -> StateDict:
        """The form ``torch.optim`` uses, parameters numbered, and their names under ``"param_fqns"``.

        ``load_state_dict`` of an optimizer with the same parameters in the same order takes it.
        """
        number = {parameter.label: index for index, parameter in enumerate(self.parameters)}
        state: dict[Any, Any] = {}
        for slot, values in self.slots.items():
            for label, value in values.items():
                state.setdefault(number[label], {})[slot] = value
        return {
            "state": {**{index: state[index] for index in sorted(state)}, **self.extra_state},
            "param_groups": [
                {**group, "params": positions} for group, positions in zip(self.groups, self.positions(), strict=True)
            ],
            **self.extra,
            "param_fqns": [None if p.owner is None else p.owner.name for p in self.parameters],
        }


class OptimizerView(NamedTuple):
    """A live optimizer's state dict, taken apart.

    Attributes:
        parameters: the live parameters, group after group.
        groups: hyperparameters of each group, without ``params``.
        group_sizes: how many parameters each group has.
        state: state of each parameter by its number.
        extra_state: entries of ``state`` that belong to no parameter.
        extra: other entries of the state dict.
    """

    parameters: list[torch.Tensor]
    groups: list[dict[str, Any]]
    group_sizes: list[int]
    state: dict[int, dict[Any, Any]]
    extra_state: dict[Any, Any]
    extra: dict[str, Any]


def view_optimizer(optimizer: torch.optim.Optimizer, state_dict: Any) -> OptimizerView | None:
    """Take apart what ``optimizer.state_dict()`` returned.

    Returns:
        None when it is not torch's usual form (an override, or a hook, made something else of it);
        such an optimizer is stored like any other object.
    """
    try:
        groups = state_dict["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        sizes = [len(group["params"]) for group in groups]
        live_sizes = [len(group["params"]) for group in optimizer.param_groups]
        state = state_dict["state"]
    except (KeyError, TypeError):
        return None
    if sizes != live_sizes or numbers != list(range(len(numbers))) or type(state) is not dict:
        return None
    known = range(len(numbers))
    own = {key: value for key, value in state.items() if type(key) is int and key in known}
    if not all(type(value) is dict and value.keys().isdisjoint(RESERVED) for value in own.values()):
        return None
    return OptimizerView(
        parameters=[parameter for group in optimizer.param_groups for parameter in group["params"]],
        groups=[{name: value for name, value in group.items() if name != "params"} for group in groups],
        group_sizes=sizes,
        state=own,
        extra_state={key: value for key, value in state.items() if key not in own},
        extra={key: value for key, value in state_dict.items() if key not in ("state", "param_groups")},
    )


def labels_of(owners: Sequence[Owner | None]) -> list[Label]:
    """A different label for each parameter: its name, its index if it has none.

    Equal names in two modules (a GAN whose two networks share one optimizer): the later one is
    preceded by the path of its module.
    """
    labels: list[Label] = []
    taken: set[Label] = set()
    for index, owner in enumerate(owners):
        label: Label = index if owner is None else owner.name
        if owner is not None and label in taken:
            label = f"{owner.module}/{owner.name}"
        if label in taken:
            label = index
        taken.add(label)
        labels.append(label)
    return labels


def transpose(view: OptimizerView, labels: Sequence[Label]) -> dict[Any, dict[Label, Any]]:
    """Values by slot and label, from values by parameter and slot."""
    slots: dict[Any, dict[Label, Any]] = {}
    for number, values in view.state.items():
        label = labels[number]
        for slot, value in values.items():
            try:
                slots[slot][label] = value
            except KeyError:
                slots[slot] = {label: value}
    return slots


def parameters_from_nodes(nodes: Sequence[Sequence[Any]], modules: Sequence[str]) -> tuple[StoredParameter, ...]:
    """Parameters from their tree nodes ``[label, shape, index of the module or -1, name if not the label]``.

    Raises:
        TypeError, ValueError, IndexError: they are something else.
    """
    return tuple(_parameter_from_node(node, modules) for node in nodes)


def _parameter_from_node(node: Sequence[Any], modules: Sequence[str]) -> StoredParameter:
    label, shape, module, *name = node
    owner = None if module < 0 else Owner(modules[module], name[0] if name else label)
    if type(label) not in (str, int) or not all(type(size) is int for size in shape):
        raise ValueError("a parameter of an optimizer without a label or a shape")
    if owner is not None and not (type(owner.module) is type(owner.name) is str):
        raise ValueError("a parameter of an optimizer without a name")
    return StoredParameter(label, owner, tuple(shape))


def parameters_to_nodes(
    view: OptimizerView, labels: Sequence[Label], owners: Sequence[Owner | None]
) -> tuple[list[list[Any]], list[str]]:
    """Inverse of `parameters_from_nodes`: the nodes, and the paths of the modules they refer to."""
    modules: dict[str, int] = {}
    nodes: list[list[Any]] = []
    for parameter, label, owner in zip(view.parameters, labels, owners, strict=True):
        shape = list(parameter.shape)
        if owner is None:
            nodes.append([label, shape, -1])
            continue
        module = modules.setdefault(owner.module, len(modules))
        nodes.append([label, shape, module] if label == owner.name else [label, shape, module, owner.name])
    return nodes, list(modules)
