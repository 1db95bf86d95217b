"""What the machine itself can do: the two numbers no saver can beat."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["direct_write_seconds", "memcpy_seconds"]

_BLOCK_BYTES = 4 * 2**20


def memcpy_seconds(tensors: Sequence[Tensor], repetitions: int = 5) -> list[float]:
    """Copy all *tensors* into memory that is already mapped, with every core torch may use.

    This is the least a snapshot of CPU tensors can cost.
    """
    # Whole cache lines per tensor keep every destination aligned.
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // 64) * 64)
    buffer = torch.zeros(offsets[-1], dtype=torch.uint8)
    pairs = [
        (buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape), tensor.detach())
        for offset, tensor in zip(offsets, tensors, strict=False)
    ]
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def direct_write_seconds(num_bytes: int, directory: Path, threads: int) -> float:
    """Write *num_bytes* with O_DIRECT, one file per thread, and fsync: what the disk takes.

    Returns:
        Seconds until the last fsync returned; NaN where the file system refuses O_DIRECT.
    """
    share = -(-num_bytes // threads // _BLOCK_BYTES) * _BLOCK_BYTES
    buffer = mmap.mmap(-1, _BLOCK_BYTES)
    buffer.write(os.urandom(_BLOCK_BYTES))
    paths = [directory / f"probe-{index}" for index in range(threads)]

    def write(path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            for _ in range(share // _BLOCK_BYTES):
                os.write(fd, buffer)
            os.fsync(fd)
        finally:
            os.close(fd)

    try:
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            _wait_all(pool.map(write, paths))
            return time.perf_counter() - started
    except OSError:
        return float("nan")
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _wait_all(results: Iterable[None]) -> None:
    for _ in results:
        pass
