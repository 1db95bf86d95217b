"""Where each tensor of a snapshot goes in the staging memory. Pure; cached from save to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from asyncckpt.errors import InvalidOptionError
from asyncckpt.memory import aligned
from asyncckpt.model import TensorSpec
from asyncckpt.staging.leaf import Leaf
from asyncckpt.staging.packing import SMALL_BYTES

__all__ = ["SegmentPlan", "StagingPlan", "plan_staging", "signature_of"]


Signature = tuple[tuple[str, str, tuple[int, ...], bool], ...]


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """A run of leaves that is staged at once.

    Attributes:
        start: index of its first leaf; ``stop`` is one past its last.
        offsets: byte offset of each leaf in the segment's arena. Not ascending: small tensors of a CUDA device
            lie side by side.
        num_bytes: arena bytes it needs.
        specs: its `TensorSpec` list, already encoded for the writer.
    """

    start: int
    stop: int
    offsets: tuple[int, ...]
    num_bytes: int
    specs: msgspec.Raw


@dataclass(frozen=True, slots=True)
class StagingPlan:
    """Segments of one snapshot: a single one unless the state is larger than the memory limit."""

    signature: Signature
    segments: tuple[SegmentPlan, ...]
    raw_bytes: int

    @property
    def arena_bytes(self) -> int:
        return max(segment.num_bytes for segment in self.segments)


def signature_of(leaves: Sequence[Leaf]) -> Signature:
    """What a plan depends on; equal signatures may share a plan."""
    return tuple((leaf.key, leaf.data_type, leaf.shape, leaf.trained) for leaf in leaves)


def plan_staging(leaves: Sequence[Leaf], limit_bytes: int | None) -> StagingPlan:
    """Give each of *leaves* its place.

    A state that does not fit *limit_bytes* is cut into segments of at most half of it, which pass
    through two arenas in turn.

    Args:
        leaves: the captured tensors.
        limit_bytes: staging memory for this snapshot; None is no limit.

    Raises:
        InvalidOptionError: a single tensor is larger than half of the limit.
    """
    sizes = [aligned(leaf.tensor.numel() * leaf.tensor.element_size()) for leaf in leaves]
    raw_bytes = sum(leaf.tensor.numel() * leaf.tensor.element_size() for leaf in leaves)
    if limit_bytes is None or sum(sizes) <= limit_bytes:
        cuts = [(0, len(leaves))]
    else:
        cuts = _cut(leaves, sizes, limit_bytes // 2)
    segments = tuple(_lay_out(leaves, sizes, start, stop) for start, stop in cuts)
    return StagingPlan(signature_of(leaves), segments, raw_bytes)


def _neighbourhood(tensor: torch.Tensor, size: int) -> tuple[int, bool]:
    """Leaves with equal ones lie side by side: what a CUDA device gathers should be one piece here, too."""
    return (tensor.device.index, size > SMALL_BYTES) if tensor.is_cuda else (-1, False)


def _cut(leaves: Sequence[Leaf], sizes: Sequence[int], half_bytes: int) -> list[tuple[int, int]]:
    cuts: list[tuple[int, int]] = []
    start = filled = 0
    for index, size in enumerate(sizes):
        if size > half_bytes:
            raise InvalidOptionError(
                f"Staging.memory_limit is too small: {leaves[index].key} alone has {size} bytes and each slot "
                f"needs twice its largest tensor; raise the limit to at least {2 * size} bytes per slot",
                key=leaves[index].key,
            )
        if filled + size > half_bytes:
            cuts.append((start, index))
            start, filled = index, 0
        filled += size
    cuts.append((start, len(sizes)))
    return cuts


def _lay_out(leaves: Sequence[Leaf], sizes: Sequence[int], start: int, stop: int) -> SegmentPlan:
    order = sorted(range(start, stop), key=lambda index: _neighbourhood(leaves[index].tensor, sizes[index]))
    offsets = [0] * (stop - start)
    end = 0
    for index in order:
        offsets[index - start] = end
        end += sizes[index]
    specs = [
        TensorSpec(leaf.key, leaf.data_type, leaf.shape, offset, leaf.torch_dtype, leaf.trained)
        for leaf, offset in zip(leaves[start:stop], offsets, strict=True)
    ]
    return SegmentPlan(start, stop, tuple(offsets), max(end, 1), msgspec.Raw(msgspec.json.encode(specs)))
