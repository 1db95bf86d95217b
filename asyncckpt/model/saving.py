"""One save: its tensors, how it ends, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Outcome", "SaveStats", "TensorSpec"]

Outcome = Literal["pending", "durable", "failed", "skipped", "superseded", "cancelled"]


@dataclass(frozen=True, slots=True)
class SaveStats:
    """What one save cost, and what was noticed. Seconds are wall time; bytes are exact.

    Attributes:
        blocked_s: how long ``save()`` kept the caller.
        stage_s: from ``save()`` until the snapshot was complete and the writer had it.
        encode_s: thread-seconds spent compressing and hashing.
        write_s: thread-seconds spent in write calls.
        commit_s: flush, header, rename and directory fsyncs.
        durable_s: from ``save()`` until the checkpoint was durable.
        raw_bytes: bytes of all tensors, shared ones counted once.
        stored_bytes: bytes of all files of the step.
        linked_bytes: those of ``stored_bytes`` that were not written but are shared with the previous step.
        finite: whether every floating point value was finite; None if nobody looked (``Staging(check_finite=)``).
        stale: whether nothing that is trained had changed since the save before.
        warnings: what is to be told of it, in words.
    """

    blocked_s: float = 0.0
    stage_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    commit_s: float = 0.0
    durable_s: float = 0.0
    raw_bytes: int = 0
    stored_bytes: int = 0
    linked_bytes: int = 0
    finite: bool | None = None
    stale: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one staged tensor lies in an arena and how it is to be stored.

    Attributes:
        key: array key inside the step, ``state/model/lm_head.weight``.
        data_type: Zarr data type name.
        shape: global shape.
        offset: first byte in the arena; C order, little endian.
        torch_dtype: torch's name for the type when Zarr has none.
        trained: whether it is a tensor that gradients are wanted for, so that training should change it.
    """

    key: str
    data_type: str
    shape: tuple[int, ...]
    offset: int
    torch_dtype: str | None = None
    trained: bool = False
