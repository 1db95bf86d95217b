"""Takes the state apart: a tree that describes it, and the tensors to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from asyncckpt.errors import UnsupportedStateError
from asyncckpt.format.tree import Node
from asyncckpt.interpreter import collector_paused
from asyncckpt.state.encoder import StateEncoder
from asyncckpt.state.leaves import TensorLeaf
from asyncckpt.state.places import Place

__all__ = ["Capture", "TensorLeaf", "capture"]


class Capture(NamedTuple):
    """A captured state.

    Attributes:
        tree: node of the whole state; see `asyncckpt.format.tree`. It holds no live object, so it
            may be encoded later and in another thread.
        leaves: tensors to store, which may alias live ones. Equal structures give equal lists but
            for the tensors, so what was planned for one capture serves the next.
        optimizers: those whose state is in it.
    """

    tree: Node
    leaves: list[TensorLeaf]
    optimizers: list[torch.optim.Optimizer]


def capture(state: Mapping[str, Any]) -> Capture:
    """Collect everything in *state*, without copying tensors.

    Args:
        state: what to save, by name.

    Raises:
        UnsupportedStateError: a value that cannot be stored; the message names its path and type.
    """
    for name in state:
        if not isinstance(name, str):
            raise UnsupportedStateError(f"names in the state are texts, not {name!r}", key=repr(name), type="key")
    with collector_paused():
        encoder = StateEncoder()
        tree = encoder.encode(dict(state), Place("", "state", 0, False))
        encoder.encode_postponed()
        return Capture(tree, encoder.leaves.finish(), encoder.optimizers)
