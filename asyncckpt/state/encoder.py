"""Walks a state and makes its tree."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format.paths import escape_component
from asyncckpt.format.tree import MAX_DEPTH, Node
from asyncckpt.state.arrays import encode_scalar
from asyncckpt.state.keys import components, has_plain_keys, is_json_text
from asyncckpt.state.leaves import LeafCollector
from asyncckpt.state.modules import ModuleState, canonical_names, read_module
from asyncckpt.state.optimizer import (
    RESERVED,
    OptimizerView,
    labels_of,
    parameters_to_nodes,
    transpose,
    view_optimizer,
)
from asyncckpt.state.param_names import ParameterNames
from asyncckpt.state.places import Place, encode_plain, finished, finished_parts
from asyncckpt.state.registry import TypeCodec, codec_for
from asyncckpt.state.rng import RNG
from asyncckpt.state.stateful import Stateful, is_stateful
from asyncckpt.state.tensors import PLAIN_KINDS
from asyncckpt.state.torch_types import torch_name

__all__ = ["StateEncoder"]

# What the tree module encodes without help; containers of these alone are handed over whole.
_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})


class StateEncoder:
    """Encodes one state. Two things wait until everything else is encoded:

    * names of an optimizer's parameters, because the module may come after the optimizer;
    * random generators, because asking a data loader for its state may draw from them, and the
      resumed run does not draw those numbers again.

    Attributes:
        leaves: the tensors found.
        optimizers: the optimizers found.
    """

    def __init__(self) -> None:
        self.leaves = LeafCollector()
        self.optimizers: list[torch.optim.Optimizer] = []
        self._names = ParameterNames()
        self._postponed: list[Callable[[], None]] = []
        self._generators: list[Callable[[], None]] = []

    def encode(self, value: Any, place: Place) -> Node:
        """The node of *value*.

        Raises:
            UnsupportedStateError: it cannot be stored; names path and type.
        """
        kind = type(value)
        if kind in PLAIN_KINDS:
            return self.leaves.add_tensor(value, place.key, place.path)
        if kind in _SCALARS:
            return encode_plain(value, place)
        if place.depth > MAX_DEPTH:
            raise UnsupportedStateError(
                f"{place.path[:200]} is nested more than {MAX_DEPTH} levels deep", key=place.path[:200]
            )
        if kind is dict:
            return self._encode_dict(value, place)
        if kind is list:
            return self._encode_list(value, place)
        if kind is tuple:
            return encode_plain(tuple(map(finished, self._encode_list(value, place))), place)
        if kind is OrderedDict:
            return self._encode_ordered(value, place)
        return self._encode_other(value, place)

    def encode_postponed(self) -> None:
        """Fill in what had to wait; call it once, at the end."""
        for encode in (*self._postponed, *self._generators):
            encode()

    # -- containers ----------------------------------------------------------------------------

    def _encode_dict(self, value: dict[Any, Any], place: Place) -> Node:
        if set(map(type, value.values())) <= _SCALARS:
            return encode_plain(value, place)
        nodes = self._encode_values(value, place)
        if has_plain_keys(nodes):
            return nodes
        return encode_plain(finished_parts(nodes), place)

    def _encode_ordered(self, value: OrderedDict[Any, Any], place: Place) -> Node:
        copy = OrderedDict(finished_parts(self._encode_values(value, place)))
        if hasattr(value, "_metadata"):
            copy._metadata = value._metadata  # type: ignore[attr-defined]
        return encode_plain(copy, place)

    def _encode_values(self, value: dict[Any, Any], place: Place) -> dict[Any, Node]:
        return dict(zip(value, self._encode_items(value.items(), components(value.keys()), place), strict=True))

    def _encode_list(self, value: list[Any] | tuple[Any, ...], place: Place) -> list[Node]:
        if set(map(type, value)) <= _SCALARS:
            plain: list[Node] = encode_plain(list(value), place)
            return plain
        return self._encode_items(enumerate(value), map(str, range(len(value))), place)

    def _encode_items(self, items: Iterable[tuple[Any, Any]], names: Iterable[str], place: Place) -> list[Node]:
        add_tensor, encode, key = self.leaves.add_tensor, self.encode, place.key
        path = f"{place.path}/" if place.path else ""
        return [
            add_tensor(item, f"{key}/{name}", f"{path}{own}")
            if type(item) in PLAIN_KINDS
            else encode(item, place.below(own, name))
            for (own, item), name in zip(items, names, strict=True)
        ]

    # -- everything else -----------------------------------------------------------------------

    def _encode_other(self, value: Any, place: Place) -> Node:
        codec = codec_for(type(value))
        if codec is not None:
            return self._encode_registered(value, codec, place)
        if isinstance(value, torch.Tensor):
            return self.leaves.add_tensor(value, place.key, place.path)
        # Of the subclasses only memmap: a masked array would lose its mask.
        if type(value) in (np.ndarray, np.memmap):
            return self.leaves.add_array(value, place.key, place.path)
        if isinstance(value, np.generic):
            return encode_scalar(value, place.path)
        if isinstance(value, torch.dtype):
            return {"$": "torch.dtype", "name": torch_name(value)}
        if isinstance(value, torch.device):
            return {"$": "torch.device", "name": str(value)}
        if isinstance(value, torch.Size):
            return {"$": "torch.Size", "items": list(value)}
        if is_stateful(value):
            return self._encode_object(value, place)
        return encode_plain(value, place)

    def _encode_registered(self, value: Any, codec: TypeCodec, place: Place) -> Node:
        # A defaultdict is a container of the user's like a dict, and is restored in place like one.
        inner = place if codec.cls is defaultdict else place.inside()
        return {"$": "custom", "type": codec.name, "value": self.encode(codec.encode(value), inner)}

    def _encode_object(self, value: Stateful, place: Place) -> Node:
        if place.is_inside:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            raise UnsupportedStateError(
                f"{place.path} is a {name} inside the state of another object, which cannot be restored in place; "
                "let that object return its state_dict() instead",
                key=place.path,
                type=name,
            )
        if isinstance(value, nn.Module):
            return self._encode_module(value, place)
        if isinstance(value, torch.optim.Optimizer):
            return self._encode_optimizer(value, place)
        if isinstance(value, RNG):
            return self._encode_generators(value, place)
        return self.encode(value.state_dict(), place.inside())

    def _encode_generators(self, value: RNG, place: Place) -> Node:
        node: dict[str, Node] = {}
        self._generators.append(lambda: node.update(self.encode(value.state_dict(), place.inside())))
        return node

    # -- modules -------------------------------------------------------------------------------

    def _encode_module(self, module: nn.Module, place: Place) -> Node:
        live = read_module(module)
        if not isinstance(live, dict) or not set(map(type, live)) <= {str}:
            self._names.add(place.path, module, None)
            return self.encode(live, place.inside())
        state = canonical_names(module, live)
        self._names.add(place.path, module, state)
        keys = map(escape_component, state.names)
        items = zip(state.names, live.values(), strict=True)
        nodes = dict(zip(state.names, self._encode_items(items, keys, place.inside()), strict=True))
        if type(live) is dict:
            return nodes if has_plain_keys(nodes) else encode_plain(finished_parts(nodes), place)
        # As the tree module writes an OrderedDict, without visiting every entry again.
        node: dict[str, Node] = {"$": "odict", "items": [[name, part] for name, part in nodes.items()]}
        if not has_plain_keys(nodes):
            node = encode_plain(OrderedDict(finished_parts(nodes)), place)
        metadata = getattr(live, "_metadata", None)
        if metadata is not None:
            node["meta"] = self._encode_metadata(state, metadata, place)
        return node

    def _encode_metadata(self, state: ModuleState, metadata: dict[str, Any], place: Place) -> Node:
        # Nearly all entries are {"version": 1}; equal ones share a node.
        known: dict[Any, Node] = {}
        nodes: dict[str, Node] = {}
        for name, entry in metadata.items():
            version = entry.get("version") if type(entry) is dict and len(entry) == 1 else None
            if type(version) is not int:
                nodes[state.rename(name)] = self.encode(entry, place.inside().inside())
                continue
            if version not in known:
                known[version] = self.encode(entry, place.inside().inside())
            nodes[state.rename(name)] = known[version]
        return nodes if has_plain_keys(nodes) else encode_plain(finished_parts(nodes), place)

    # -- optimizers ----------------------------------------------------------------------------

    def _encode_optimizer(self, optimizer: torch.optim.Optimizer, place: Place) -> Node:
        self.optimizers.append(optimizer)
        state_dict = optimizer.state_dict()
        view = view_optimizer(optimizer, state_dict)
        if view is None:
            return self.encode(state_dict, place.inside())
        node: dict[str, Node] = {"$": "optimizer"}
        self._postponed.append(lambda: node.update(self._encode_view(view, place.inside())))
        return node

    def _encode_view(self, view: OptimizerView, place: Place) -> dict[str, Node]:
        owners = self._names.find(view.parameters)
        labels = labels_of(owners)
        parameters, modules = parameters_to_nodes(view, labels, owners)
        if not is_json_text("".join([*modules, *(owner.name for owner in owners if owner is not None)])):
            parameters, modules = encode_plain(parameters, place), encode_plain(modules, place)
        slots = transpose(view, labels)
        slot_names = components([*RESERVED, *slots])[len(RESERVED) :]
        label_names = dict(zip(labels, components(labels), strict=True))
        nodes: dict[Any, Node] = {}
        for (slot, values), name in zip(slots.items(), slot_names, strict=True):
            below = place.below(slot, name)
            parts = self._encode_items(values.items(), [label_names[label] for label in values], below)
            by_label = dict(zip(values, parts, strict=True))
            nodes[slot] = by_label if has_plain_keys(by_label) else encode_plain(finished_parts(by_label), below)
        node: dict[str, Node] = {
            "modules": modules,
            "parameters": parameters,
            "group_sizes": view.group_sizes,
            "slots": nodes if has_plain_keys(nodes) else encode_plain(finished_parts(nodes), place),
        }
        for name, rest in zip(RESERVED, (view.groups, view.extra_state, view.extra), strict=True):
            node[name] = self.encode(rest, place.below(name, name))
        return node
