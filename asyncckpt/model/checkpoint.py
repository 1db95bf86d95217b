"""What is known of a committed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, get_args

__all__ = ["KINDS", "CheckpointInfo", "Kind", "Mismatch"]

Kind = Literal["regular", "validation", "best", "emergency", "manual", "final"]
"""Why a checkpoint was saved; `KINDS` are all of them."""
KINDS: tuple[Kind, ...] = get_args(Kind)

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How checkpoint and live state differ; keys are ``/``-joined paths such as ``model/lm_head.weight``."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One committed checkpoint.

    Attributes:
        step: the training step it holds.
        path: absolute directory (or URL) of the step.
        kind: why it was saved, one of `KINDS`; other programs may have written another.
        created: when ``save()`` was called, UTC.
        metrics: the metrics given to ``save()``, ``step()`` or ``validated()``.
        tags: names given to ``save()``.
        raw_bytes: bytes of all tensors before compression.
        stored_bytes: bytes of all files except the header itself.
        num_arrays: Zarr arrays that hold tensors.
        world_size: ranks that wrote it.
        format: version of the on-disk format.
        nonce: unique name of this write.
        run: identity of the run that wrote it.
        versions: software versions at save time.
        metadata: the user's ``metadata=``.
        finite: whether every floating point value in it is finite; None if nobody looked when it was saved.
        warnings: what was noticed while it was saved, in words; only the future of the save tells.
        fell_back_from: newer steps that were damaged (or not finite) and skipped by ``restore``; also
            this one, if it was damaged and taken from the mirror.
        from_mirror: whether ``restore`` took it from the mirror, where ``path`` is.
        mismatch: what ``restore(strict=False)`` did not load.
    """

    step: int
    path: str
    kind: str
    created: datetime
    raw_bytes: int
    stored_bytes: int
    num_arrays: int
    world_size: int
    format: int
    nonce: str
    run: str = ""
    metrics: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    tags: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    metadata: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    finite: bool | None = None
    warnings: tuple[str, ...] = ()
    fell_back_from: tuple[int, ...] = ()
    from_mirror: bool = False
    mismatch: Mismatch = Mismatch()
