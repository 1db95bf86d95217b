"""The tensor operations of a snapshot on a device. Tests replace them, as there is no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from asyncckpt.memory import Arena
from asyncckpt.staging.cpu import arena_view

__all__ = ["DeviceOps", "pieces_of"]

_PIECE_BYTES = 32 * 2**20


class DeviceOps:
    """Each method queues its work on the current stream of the device and returns.

    None of it takes part in autograd or inference mode: a buffer made in inference mode could not be written to
    after it.
    """

    @torch.inference_mode(False)
    def allocate(self, num_bytes: int, index: int) -> torch.Tensor:
        """Bytes on device *index*.

        Raises:
            torch.OutOfMemoryError: there are none.
        """
        return torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", index))

    @torch.inference_mode(False)
    def view(self, buffer: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor over *buffer* with type and shape of *like*."""
        num_bytes = like.numel() * like.element_size()
        return buffer[place : place + num_bytes].view(like.dtype).view(like.shape)

    @torch.inference_mode(False)
    @torch.no_grad()
    def gather(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy within the device; a few kernels for all tensors of a type."""
        torch._foreach_copy_(list(targets), list(sources))

    @torch.inference_mode(False)
    @torch.no_grad()
    def download(self, arena: Arena, offset: int, source: torch.Tensor) -> None:
        """Copy *source* to *offset*; it does not wait for the device if *arena* is pinned."""
        target = arena_view(arena, offset, source)
        for part, values in pieces_of(target, source):
            part.copy_(values, non_blocking=True)


def pieces_of(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a strided source, and *target* alike: torch makes it contiguous on the device first, which takes memory."""
    if source.is_contiguous() or source.numel() * source.element_size() <= _PIECE_BYTES:
        yield target, source
        return
    axis = next(axis for axis, size in enumerate(source.shape) if size > 1)
    row_bytes = source.numel() * source.element_size() // source.shape[axis]
    rows = max(1, _PIECE_BYTES // row_bytes)
    for part, values in zip(torch.split(target, rows, axis), torch.split(source, rows, axis), strict=True):
        if part.shape[axis] > 1:
            yield part, values
        else:
            yield from pieces_of(part, values)
