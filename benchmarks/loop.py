"""A training loop that the host cannot feed fast enough: hundreds of tiny operations per step.

This is where background work hurts most. The time of a step is the time Python and the dispatcher
take to launch its operations, so whatever holds the GIL or a core makes it longer, exactly as for a
GPU that waits for launches. No operation is large enough for torch to use a second thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

__all__ = ["Guard", "LaunchBoundLoop"]

Guard = Callable[[], AbstractContextManager[object]]
"""Entered around every update of the state; a saver may wait in it until its snapshot is complete."""

_WIDTH = 32
_BATCH = 8


class LaunchBoundLoop:
    """Forward, backward and SGD over a chain of tiny layers, every operation launched one by one.

    Attributes:
        guard_s: seconds spent so far waiting in the guard.
    """

    def __init__(self, num_layers: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weights = [
            torch.randn(_WIDTH, _WIDTH, generator=generator).mul_(0.1).requires_grad_() for _ in range(num_layers)
        ]
        self._biases = [torch.zeros(_WIDTH, requires_grad=True) for _ in range(num_layers)]
        self._input = torch.randn(_BATCH, _WIDTH, generator=generator)
        self._optimizer = torch.optim.SGD([*self._weights, *self._biases], lr=1e-3, momentum=0.9, foreach=False)
        self.guard_s = 0.0

    def step(self, guard: Guard) -> None:
        """One training step."""
        x = self._input
        for weight, bias in zip(self._weights, self._biases, strict=True):
            x = torch.tanh(torch.addmm(bias, x, weight)) + x
        torch.autograd.backward(x.square().mean())
        started = time.perf_counter()
        with guard():
            self.guard_s += time.perf_counter() - started
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def run(self, num_steps: int, guard: Guard, until: Callable[[], bool] | None = None) -> list[float]:
        """Take steps and time each.

        Args:
            num_steps: how many; with *until*, at least this many after it turned true.
            guard: entered around every update.
            until: go on until this is true.

        Returns:
            Seconds of each step.
        """
        seconds: list[float] = []
        remaining = num_steps
        while remaining > 0:
            started = time.perf_counter()
            self.step(guard)
            seconds.append(time.perf_counter() - started)
            if until is None or until():
                remaining -= 1
        return seconds
