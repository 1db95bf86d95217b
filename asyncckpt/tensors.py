"""Tensors as memory: what staging and restores do to both ends of a copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["cut_alike", "view_like"]


def view_like(memory: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor over *memory*, which is bytes, at *offset* with type and shape of *like*."""
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def cut_alike(
    target: torch.Tensor, source: torch.Tensor, limit_bytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut both alike into views of at most *limit_bytes*; an element counts as no more.

    Contiguous pairs are cut anywhere, others along their axes.
    """
    if target.numel() == 0:
        return
    if target.nbytes <= limit_bytes:
        yield target, source
    elif target.is_contiguous() and source.is_contiguous():
        count = max(1, limit_bytes // target.element_size())
        yield from zip(torch.split(target.view(-1), count), torch.split(source.view(-1), count), strict=True)
    else:
        axis = next((axis for axis, size in enumerate(target.shape) if size > 1), None)
        if axis is None:
            yield target, source
            return
        rows = max(1, limit_bytes * target.shape[axis] // target.nbytes)
        for target_rows, source_rows in zip(
            torch.split(target, rows, axis), torch.split(source, rows, axis), strict=True
        ):
            yield from cut_alike(target_rows, source_rows, limit_bytes)
