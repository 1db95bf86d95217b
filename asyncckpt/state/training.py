"""The complete state of a training run as one value for ``Checkpointer(state=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from asyncckpt.errors import InvalidOptionError
from asyncckpt.state.rng import RNG
from asyncckpt.state.stateful import is_stateful

__all__ = ["TrainingState"]

_RESERVED = ("model", "optimizer", "scheduler", "scaler", "loader", "ema", "rng")


class TrainingState(dict[str, Any]):
    """Everything that decides the next training step, so that nothing of it is forgotten.

    It is a dict and may be used as one. What is None is left out. Each argument is an object with
    ``state_dict`` and ``load_state_dict``, or a dict or list of such objects (several optimizers, a generator
    and a discriminator). The objects are read at every save, and restored in place.

    Args:
        model: modules.
        optimizer: optimizers.
        scheduler: learning rate schedulers.
        scaler: gradient scalers.
        loader: data loaders that know their position, such as torchdata's ``StatefulDataLoader``.
        ema: averaged models; tensors, too.
        rng: whether to save Python's, NumPy's and torch's global random generators; or an `RNG`.
        extra: further state values by name. Plain ones (numbers, texts) are read and set here:
            ``state["epoch"] += 1`` before a save, ``state["epoch"]`` after a restore.

    Raises:
        InvalidOptionError: an argument has no state to save, or *extra* has a name of the others.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        ema: Any = None,
        rng: bool | RNG = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        given = zip(_RESERVED, (model, optimizer, scheduler, scaler, loader, ema), strict=False)  # rng comes last
        entries = {name: value for name, value in given if value is not None}
        for name, value in entries.items():
            _check(name, value)
        if rng:
            entries["rng"] = rng if isinstance(rng, RNG) else RNG()
        taken = [name for name in extra or {} if name in _RESERVED]
        if taken:
            raise InvalidOptionError(f"extra has {taken[0]!r}, which is the name of an argument; take another name")
        super().__init__(entries | dict(extra or {}))

    def __repr__(self) -> str:
        return f"TrainingState({', '.join(self)})"


def _check(path: str, value: Any) -> None:
    if is_stateful(value) or (path.startswith("ema") and isinstance(value, torch.Tensor)):
        return
    if isinstance(value, Mapping | list | tuple) and value:
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check(f"{path}/{key}", part)
        return
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, DataLoader):
        raise InvalidOptionError(
            f"{path} is a {name}, which does not know its position; use torchdata.stateful_dataloader."
            "StatefulDataLoader, which takes the same arguments, or leave the loader out and begin the epoch anew"
        )
    raise InvalidOptionError(
        f"{path} is a {name} without state_dict() and load_state_dict(); extra= takes plain values"
    )
