"""Marks on the time line of a device: CUDA events, or the wall clock where there is no GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

__all__ = ["Clock", "raw_copy_bytes_per_s"]


class Clock:
    """Records when the device reaches a point of its queue.

    Args:
        device: ``"cuda"``, or ``"cpu"``, whose queue is always empty.
    """

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"

    def mark(self) -> Any:
        """A mark at the end of what is queued now."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self._is_cuda:
            torch.cuda.synchronize()

    def wait(self, mark: Any) -> None:
        """Wait until the device has reached *mark*."""
        if self._is_cuda:
            mark.synchronize()

    def between_s(self, first: Any, second: Any) -> float:
        """Seconds between two marks that were reached."""
        return float(first.elapsed_time(second)) / 1e3 if self._is_cuda else float(second - first)

    def keep_busy(self) -> None:
        """Queue some hundred milliseconds of work that changes nothing."""
        if self._is_cuda:
            torch.cuda._sleep(500_000_000)


def raw_copy_bytes_per_s(device: str, num_bytes: int = 2**30, repetitions: int = 5) -> float:
    """What a copy of one large block from *device* into pinned host memory reaches; nothing copies faster."""
    is_cuda = device == "cuda"
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    clock, best = Clock(device), 0.0
    for _ in range(repetitions):
        clock.synchronize()
        started = clock.mark()
        target.copy_(source, non_blocking=is_cuda)
        ended = clock.mark()
        clock.synchronize()
        best = max(best, num_bytes / clock.between_s(started, ended))
    return best
