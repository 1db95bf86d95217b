"""The state that is saved over and over: every value of it follows from the step."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Content"]

_NUM_SMALL = 40


class Content:
    """Makes and checks states. About 11 MB; one tensor is larger than a chunk, many share a job, some are inline."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> torch.Tensor:
            # Whole numbers, so that adding the step is exact in every type.
            return torch.randint(0, 64, shape, generator=generator)

        self._bases: dict[str, torch.Tensor] = {"large": noise(1152, 1024).to(torch.float32)}
        for index in range(_NUM_SMALL):
            dtype = (torch.float32, torch.int64, torch.bfloat16, torch.uint8)[index % 4]
            self._bases[f"small.{index}"] = noise(163 + index, 256).to(dtype)
        self._bases["inline"] = noise(8).to(torch.float64)

    def make(self) -> dict[str, Any]:
        """A state of the right shape that belongs to no step."""
        return {"step": -1, "model": {name: torch.zeros_like(base) for name, base in self._bases.items()}}

    def fill(self, state: dict[str, Any], step: int) -> None:
        """Make *state* the one of *step*, in place."""
        state["step"] = step
        for name, base in self._bases.items():
            torch.add(base, _shift(base, step), out=state["model"][name])

    def differences(self, state: dict[str, Any], step: int) -> list[str]:
        """What of *state* is not, bit for bit, the state of *step*."""
        found = [] if state["step"] == step else ["step"]
        if state["model"].keys() != self._bases.keys():
            return [*found, "names"]
        return found + [
            name
            for name, base in self._bases.items()
            if not torch.equal(state["model"][name], torch.add(base, _shift(base, step)))
        ]


def _shift(base: torch.Tensor, step: int) -> int:
    # bfloat16 holds whole numbers up to 256 exactly.
    return step % 128 if base.dtype in (torch.bfloat16, torch.uint8) else step
