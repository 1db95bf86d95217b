"""Finds tensors that share memory, so that tied weights are stored once and come back tied."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

__all__ = ["SharedTensor", "tie_views"]


class SharedTensor(NamedTuple):
    """A captured tensor that shares its storage with others.

    Attributes:
        leaf: its position.
        tensor: strided, with at least one element.
        node: its tree node, changed in place when it turns out to be a view.
    """

    leaf: int
    tensor: torch.Tensor
    node: dict[str, Any]


class _Extent(NamedTuple):
    """Elements a tensor touches, ``[start, stop)`` in its storage. Sorts bases before what they cover."""

    start: int
    minus_stop: int
    leaf: int
    key: str


def tie_views(shared: Iterable[SharedTensor]) -> set[int]:
    """Point the nodes of covered tensors at the array that covers them.

    Equal tensors (offset, shape, strides) share one key. A tensor inside a contiguous one of the
    same type becomes a view of it. The rest is left alone and stored separately.

    Args:
        shared: tensors over one storage, in the order of their leaves.

    Returns:
        Indices of the leaves that need not be stored.
    """
    by_dtype: dict[torch.dtype, list[SharedTensor]] = {}
    for entry in shared:
        by_dtype.setdefault(entry.tensor.dtype, []).append(entry)
    dropped: set[int] = set()
    for entries in by_dtype.values():
        if len(entries) > 1:
            dropped |= _tie(entries)
    return dropped


def _tie(entries: list[SharedTensor]) -> set[int]:
    bases = _bases(entries)
    starts = [base.start for base in bases]
    own = {base.leaf for base in bases}
    dropped: set[int] = set()
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        tensor, node = entry.tensor, entry.node
        twin = first.setdefault((tensor.storage_offset(), tensor.shape, tensor.stride()), node)
        if entry.leaf in own:
            continue
        if twin is not node:
            node.update({name: twin[name] for name in ("key", "view") if name in twin})
            dropped.add(entry.leaf)
            continue
        extent = _extent(entry)
        # Bases grow in start and stop alike, so the last one that starts early enough reaches farthest.
        position = bisect.bisect_right(starts, extent.start) - 1
        if position >= 0 and bases[position].minus_stop <= extent.minus_stop:
            base = bases[position]
            node["key"] = base.key
            node["view"] = {
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "offset": extent.start - base.start,
            }
            dropped.add(entry.leaf)
    return dropped


def _bases(entries: list[SharedTensor]) -> list[_Extent]:
    """Contiguous tensors that no other contiguous one covers, by start."""
    bases: list[_Extent] = []
    for extent in sorted(_extent(entry) for entry in entries if entry.tensor.is_contiguous()):
        if not bases or extent.minus_stop < bases[-1].minus_stop:
            bases.append(extent)
    return bases


def _extent(entry: SharedTensor) -> _Extent:
    tensor = entry.tensor
    start = int(tensor.storage_offset())
    last = sum((int(size) - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Extent(start, -(start + last + 1), entry.leaf, entry.node["key"])
