"""Copies CPU tensors into an arena, large ones in pieces on several threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from asyncckpt.memory import Arena

__all__ = ["CpuCopier", "arena_view"]

_PIECE_BYTES = 8 * 2**20
# Below this a hand-over to another thread costs more than the copy.
_PARALLEL_BYTES = 1 * 2**20

_Move = tuple[int, int, int]


def arena_view(arena: Arena, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor over *arena* at *offset* with dtype and shape of *like*."""
    num_bytes = like.numel() * like.element_size()
    flat = torch.frombuffer(arena.buffer, dtype=torch.uint8, count=num_bytes, offset=offset)
    return flat.view(like.dtype).view(like.shape)


class CpuCopier:
    """Moves memory with several threads; ``memmove`` releases the GIL.

    Torch's own copy would do, but its thread count belongs to the user: a launch-bound loop runs
    with ``torch.set_num_threads(1)`` and would then be blocked twice as long.

    Args:
        threads: threads that copy, the caller's included.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="asyncckpt-copy")

    def copy(self, sources: Sequence[torch.Tensor], offsets: Sequence[int], arena: Arena) -> None:
        """Copy each tensor to its offset; complete on return."""
        base = arena.address
        moves: list[_Move] = []
        memmove = ctypes.memmove
        for source, offset in zip(sources, offsets, strict=True):
            num_bytes = source.nbytes
            if num_bytes == 0:
                continue
            if not source.is_contiguous() or source.is_conj() or source.is_neg():
                arena_view(arena, offset, source).copy_(source)
            elif num_bytes < _PARALLEL_BYTES:
                memmove(base + offset, source.data_ptr(), num_bytes)
            else:
                moves.extend(_pieces(base + offset, source.data_ptr(), num_bytes))
        self._run(moves)

    def _run(self, moves: list[_Move]) -> None:
        # A shared iterator hands out pieces; list iterators are atomic under the GIL.
        rest = iter(moves)
        helpers = [self._pool.submit(_move_all, rest) for _ in range(min(self._threads, len(moves)) - 1)]
        _move_all(rest)
        for helper in helpers:
            helper.result()

    def close(self) -> None:
        self._pool.shutdown()


def _pieces(target: int, source: int, num_bytes: int) -> list[_Move]:
    return [
        (target + start, source + start, min(_PIECE_BYTES, num_bytes - start))
        for start in range(0, num_bytes, _PIECE_BYTES)
    ]


def _move_all(moves: object) -> None:
    for target, source, num_bytes in moves:  # type: ignore[attr-defined]
        ctypes.memmove(target, source, num_bytes)
