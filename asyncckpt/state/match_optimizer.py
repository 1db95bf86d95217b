"""Which parameter and group of a live optimizer is which of the checkpoint's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from asyncckpt.state.optimizer import OptimizerView, StoredOptimizer, labels_of
from asyncckpt.state.param_names import Owner
from asyncckpt.state.problems import Problems

__all__ = ["OptimizerMatch", "match_optimizer"]


class OptimizerMatch(NamedTuple):
    """Positions in the checkpoint, None for what it does not have.

    Attributes:
        parameters: for each live parameter.
        groups: for each live group.
    """

    parameters: list[int | None]
    groups: list[int | None]


def match_optimizer(
    view: OptimizerView, owners: Sequence[Owner | None], stored: StoredOptimizer, path: str
) -> tuple[OptimizerMatch, Problems]:
    """Match by name; by position where there are no names.

    Groups belong together that have most parameters in common, wherever they are; those without any take
    what is left, in order. When two claim the same one, the position decides.
    """
    problems = Problems()
    labels = labels_of(owners)
    matched = _match_parameters(owners, stored)
    parameters = list(matched)
    for index, position in enumerate(matched):
        if position is None:
            problems.missing(f"{path}/{labels[index]}")
            continue
        shape = tuple(view.parameters[index].shape)
        if shape != stored.parameters[position].shape:
            there = list(stored.parameters[position].shape)
            problems.mismatched(
                f"{path}/{labels[index]}", f"in the checkpoint for a parameter of shape {there}, here {list(shape)}"
            )
            parameters[index] = None
    known = set(matched)
    for position, parameter in enumerate(stored.parameters):
        if position not in known:
            problems.unexpected(f"{path}/{parameter.label}")
    groups = _match_groups(view.group_sizes, matched, stored)
    if len(view.group_sizes) != len(stored.group_sizes):
        problems.mismatched(
            f"{path}/param_groups",
            f"the checkpoint has {len(stored.group_sizes)} groups, here there are {len(view.group_sizes)}",
        )
    return OptimizerMatch(parameters, groups), problems


def _match_parameters(owners: Sequence[Owner | None], stored: StoredOptimizer) -> list[int | None]:
    if not any(owners) or not any(parameter.owner for parameter in stored.parameters):
        # One of the two knows no names (its module was not in the state), so position is all there is.
        return [index if index < len(stored.parameters) else None for index in range(len(owners))]
    exact: dict[Owner, int] = {}
    by_name: dict[str, int | None] = {}
    for position, parameter in enumerate(stored.parameters):
        if parameter.owner is not None:
            exact[parameter.owner] = position
            # A name that two modules use says nothing without the module.
            by_name[parameter.owner.name] = None if parameter.owner.name in by_name else position
    found: list[int | None] = []
    taken: set[int] = set()
    for index, owner in enumerate(owners):
        match = _find(index, owner, exact, by_name, stored)
        found.append(None if match in taken else match)
        if match is not None:
            taken.add(match)
    return found


def _find(
    index: int,
    owner: Owner | None,
    exact: dict[Owner, int],
    by_name: dict[str, int | None],
    stored: StoredOptimizer,
) -> int | None:
    if owner is not None:
        return exact.get(owner, by_name.get(owner.name))
    is_nameless = index < len(stored.parameters) and stored.parameters[index].owner is None
    return index if is_nameless else None


def _match_groups(sizes: Sequence[int], parameters: Sequence[int | None], stored: StoredOptimizer) -> list[int | None]:
    if len(sizes) != len(stored.group_sizes):
        return [None] * len(sizes)
    group_of = {position: index for index, positions in enumerate(stored.positions()) for position in positions}
    found: list[int | None] = []
    start = 0
    for size in sizes:
        members = parameters[start : start + size]
        counts = Counter(group_of[position] for position in members if position is not None)
        found.append(counts.most_common(1)[0][0] if counts else None)
        start += size
    claimed = [index for index in found if index is not None]
    if len(set(claimed)) != len(claimed):
        return list(range(len(sizes)))
    rest = (index for index in range(len(sizes)) if index not in claimed)
    return [next(rest) if index is None else index for index in found]
