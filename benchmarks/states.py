"""Which state is saved: a trained model, one with bfloat16 weights, or plain tensors.

    python benchmarks/states.py             # trains, and shows that more steps do not compress differently

Training takes minutes, so its result is kept in ``.bench/states``, named after everything that determines it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from common import REPOSITORY, machine_facts, print_table, scratch_directory, stored_bytes, write_results
from state import GPT, HEADER_BYTES, SIZES, TrainingState, iter_tensors, new_state, training, with_optimizer
from torch import Tensor

__all__ = ["NUM_STEPS", "PlainState", "State", "make_state"]

NUM_STEPS = {"tiny": 20, "124M": 200}
"""How many steps a state has been trained for."""

_CACHE = REPOSITORY / ".bench" / "states"
_MILESTONES = (2, 20, 100, 200)


class State(Protocol):
    """What savers save."""

    def objects(self) -> dict[str, Any]:
        """For savers that take objects with ``state_dict``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For savers that take plain dictionaries; its tensors are the live ones."""
        ...

    def tensors(self) -> list[Tensor]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_large(self) -> int: ...


@dataclass
class PlainState:
    """Tensors by name."""

    values: dict[str, Tensor]

    def objects(self) -> dict[str, Any]:
        return {"tensors": self.values}

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.values}

    def tensors(self) -> list[Tensor]:
        return list(self.values.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values.values())

    @property
    def num_large(self) -> int:
        return sum(tensor.nbytes > HEADER_BYTES for tensor in self.values.values())


def make_state(spec: str) -> State:
    """The state that *spec* names.

    ``124M`` and ``tiny`` are trained models with AdamW in float32. ``124M bf16`` has the same moments, and the weights
    rounded to bfloat16, as mixed-precision training has them. ``10000x1024`` are so many float32 tensors of so many
    bytes, with weight-like values.
    """
    if "x" in spec:
        count, num_bytes = map(int, spec.split("x"))
        return PlainState(_weight_like(count, num_bytes))
    size, _, dtype = spec.partition(" ")
    state = _trained(size)
    if dtype == "bf16":
        moments = state.optimizer.state_dict()
        model = state.model.to(torch.bfloat16)
        # Assigned by hand: load_state_dict would round the moments as well.
        for index, parameter in enumerate(model.parameters()):
            state.optimizer.state[parameter] = moments["state"][index]
    return state


def _weight_like(count: int, num_bytes: int) -> dict[str, Tensor]:
    """Normal values with deviation 0.02, each tensor with a storage of its own."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(16 * 2**20, generator=generator).mul_(0.02)
    tensors = {}
    for index in range(count):
        tensor = torch.empty(num_bytes // 4)
        for start in range(0, tensor.numel(), block.numel()):
            part = tensor[start : start + block.numel()]
            begin = index * 256 % (block.numel() - part.numel() + 1)
            part.copy_(block[begin : begin + part.numel()])
        tensors[f"layer_{index:05d}"] = tensor
    return tensors


def _trained(size: str) -> TrainingState:
    path = _CACHE / f"{size}-{NUM_STEPS[size]}-steps-{torch.__version__}.pt"
    if not path.exists():
        state = new_state(size)
        for _ in training(state, size, NUM_STEPS[size], num_sequences=1):
            pass
        _keep(state, path)
    return _adopt(torch.load(path, weights_only=True), size)


def _keep(state: TrainingState, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(state.state_dict(), partial)
    partial.rename(path)


def _adopt(values: dict[str, Any], size: str) -> TrainingState:
    with torch.device("meta"):
        model = GPT(SIZES[size])
    model.load_state_dict(values["model"], assign=True)
    state = with_optimizer(model)
    state.optimizer.load_state_dict(values["optimizer"])
    return state


def stored_ratios(state: State, compression: Any, directory: Path) -> dict[str, float]:
    """Stored bytes per raw byte of one save, of the weights, of everything else, and of all."""
    import asyncckpt as ac

    with ac.Checkpointer(directory, state.objects(), compression=compression) as checkpointer:
        info = checkpointer.save(0).result()
        values = state.state_dict()
        raw = {name: sum(tensor.nbytes for _, tensor in iter_tensors(item)) for name, item in values.items()}
        path = Path(info.path)
        ratios = {name: stored_bytes(path / "state" / name) / num_bytes for name, num_bytes in raw.items()}
        checkpointer.delete(0)
    return {**ratios, "all": info.stored_bytes / info.raw_bytes}


def _trace(size: str, directory: Path) -> Iterator[dict[str, Any]]:
    """Compression at each milestone of the training that `make_state` does."""
    state = new_state(size)
    started = time.perf_counter()
    for step in training(state, size, NUM_STEPS[size], num_sequences=1):
        if step in _MILESTONES:
            train_s = time.perf_counter() - started
            ratios = {preset: stored_ratios(state, preset, directory / preset) for preset in ("fast", "small")}
            yield {"num_steps": step, "train_s": train_s, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/state_steps.json")
    arguments = parser.parse_args()
    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        found = list(_trace(arguments.size, directory))
    presets, parts = ("fast", "small"), ("model", "optimizer", "all")
    header = ["steps", *(f"{preset} {part}" for preset in presets for part in parts)]
    rows = [
        [str(at["num_steps"]), *(f"{at[preset][part]:.3f}" for preset in presets for part in parts)] for at in found
    ]
    print_table(header, rows)
    target = write_results("state_steps", {"machine": facts, "size": arguments.size, "steps": found}, arguments.output)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
