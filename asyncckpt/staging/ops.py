"""The tensor operations of a snapshot on a device. Tests replace them, as there is no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from asyncckpt.memory import Arena
from asyncckpt.staging.cpu import arena_view
from asyncckpt.tensors import cut_alike, view_like

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
        return view_like(buffer, place, like)

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
    return cut_alike(target, source, source.nbytes if source.is_contiguous() else _PIECE_BYTES)
