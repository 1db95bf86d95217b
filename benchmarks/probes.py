"""What the machine itself can do: numbers that no saver can beat."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "buffered_write_seconds", "codec_seconds", "direct_write_seconds", "drop_from_page_cache", "memcpy_seconds",
    "read_seconds",
]  # fmt: skip

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


def buffered_write_seconds(num_bytes: int, path: Path) -> float:
    """Write *num_bytes* to a new file at *path* through the page cache, fsync included; the file stays."""
    block = os.urandom(_BLOCK_BYTES)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-num_bytes // _BLOCK_BYTES)):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def read_seconds(path: Path) -> float:
    """Read the file at *path* once, front to back, into memory that is mapped already."""
    buffer = bytearray(_BLOCK_BYTES)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def drop_from_page_cache(path: Path, *, wholly: bool) -> str:
    """Make the next read of *path*, a file or a directory, come from the disk.

    Args:
        wholly: empty all of the page cache, names of files too, if this is root.

    Returns:
        How it was done.
    """
    if wholly:
        os.sync()
        with suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return "drop_caches"
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    return "fadvise"


def codec_seconds(values: Tensor, preset: str, repetitions: int) -> dict[str, list[float]]:
    """What one core needs to ``encode`` and ``decode`` *values* with the codec of *preset*, in the chunks that it cuts.

    Args:
        values: contiguous float32.
        preset: ``fast`` or ``small``.
    """
    from numcodecs import blosc

    from asyncckpt.format.codecs import SHUFFLES
    from asyncckpt.model import TensorSpec
    from asyncckpt.writer.jobs import plan_jobs

    plan = plan_jobs([TensorSpec("values", "float32", tuple(values.shape), 0)], preset)
    files = [task for job in plan.jobs for task in job]
    layout = files[0].layout
    codec = next(codec["configuration"] for codec in layout.codecs if codec["name"] == "blosc")
    settings = codec["cname"].encode(), codec["clevel"], SHUFFLES[codec["shuffle"]], codec["blocksize"]
    raw = values.detach().reshape(-1).numpy()
    cuts = [slice(start // 4, stop // 4) for file in files for _, start, stop in layout.chunks(file.part)]
    blosc.use_threads = False
    target = np.empty(layout.chunk_bytes // 4, dtype=raw.dtype)
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(repetitions):
        started = time.perf_counter()
        frames = [blosc.compress(raw[cut], *settings) for cut in cuts]
        encoded = time.perf_counter()
        for cut, frame in zip(cuts, frames, strict=True):
            blosc.decompress(frame, target[: cut.stop - cut.start])
        seconds["encode"].append(encoded - started)
        seconds["decode"].append(time.perf_counter() - encoded)
    return seconds


def _wait_all(results: Iterable[None]) -> None:
    for _ in results:
        pass
