"""The random generators of the process as one state value."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import InvalidOptionError, StateMismatchError

__all__ = ["RNG"]

_State = dict[str, Any]


class RNG:
    """State of Python's, NumPy's and torch's global random generators, CUDA's included.

    Put one in the state (``state={"model": model, "rng": RNG()}``) and a resumed run draws the
    numbers the uninterrupted one would have drawn, bit for bit. NumPy means its legacy global
    generator; a ``numpy.random.Generator`` or ``torch.Generator`` of your own is not covered.

    CUDA generators are saved when CUDA is initialised. States of devices that do not exist when
    restoring are ignored, and devices that were not saved are left as they are.

    Args:
        devices: CUDA devices to save and restore, by index or as ``"cuda:1"``; None is all of them.
    """

    def __init__(self, devices: Iterable[int | str | torch.device] | None = None) -> None:
        self._devices = None if devices is None else tuple(_cuda_index(device) for device in devices)

    def __repr__(self) -> str:
        return "RNG()" if self._devices is None else f"RNG(devices={list(self._devices)})"

    def state_dict(self) -> _State:
        """The present state: fresh arrays and tensors, nothing shared with the generators."""
        version, words, gauss_next = random.getstate()
        return {
            # 624 words and the position, all below 2**32: 2.5 kB as an array, ten times that as numbers.
            "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss_next": gauss_next},
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": {index: torch.cuda.get_rng_state(index) for index in self._cuda_indices()},
        }

    def load_state_dict(self, state: _State) -> None:
        """Set every generator to *state*, or none of them.

        Raises:
            StateMismatchError: *state* is not what `state_dict` gives.
        """
        before = self.state_dict()
        try:
            self._load(state)
        except Exception as error:  # four libraries, each with errors of its own
            self._load(before)
            raise StateMismatchError(f"the stored random state cannot be set here: {error!r}") from error

    def _load(self, state: _State) -> None:
        python = state["python"]
        random.setstate((python["version"], tuple(np.asarray(python["words"]).tolist()), python["gauss_next"]))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        count = torch.cuda.device_count()
        for index, stored in state["cuda"].items():
            if index < count and (self._devices is None or index in self._devices):
                torch.cuda.set_rng_state(stored, index)

    def _cuda_indices(self) -> Iterable[int]:
        # Asking an uninitialised CUDA would initialise it: slow, and fatal for forks that come later.
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return ()
        return range(torch.cuda.device_count()) if self._devices is None else self._devices


def _cuda_index(device: int | str | torch.device) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    if index is None:
        raise InvalidOptionError(f"RNG(devices=...) needs devices with an index, such as 'cuda:0', not {device!r}")
    return index
