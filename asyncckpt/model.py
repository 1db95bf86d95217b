"""Frozen value objects that several layers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, get_args

from asyncckpt.errors import CheckpointError

__all__ = [
    "KINDS",
    "CheckpointInfo",
    "Damage",
    "Durations",
    "Health",
    "IntervalReport",
    "Kind",
    "MirrorHealth",
    "Mismatch",
    "Outcome",
    "Recovered",
    "SaveStats",
    "Statistics",
    "TensorSpec",
    "VerifyReport",
]

Outcome = Literal["pending", "durable", "failed", "skipped", "superseded", "cancelled"]

Kind = Literal["regular", "validation", "best", "emergency", "manual", "final"]
"""Why a checkpoint was saved; `KINDS` are all of them."""
KINDS: tuple[Kind, ...] = get_args(Kind)

_EMPTY: Mapping[str, Any] = MappingProxyType({})


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


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file.

    Attributes:
        key: the file, relative to the step.
        reason: what is wrong with it.
        array: array whose values are lost with it, ``state/model/lm_head.weight``; empty when it holds none.
        tensors: paths in the state of the tensors over that array, ``model/lm_head.weight``, where the
            header tells; tied ones are several.
    """

    key: str
    reason: str
    array: str = ""
    tensors: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``verify``.

    Attributes:
        step: the step.
        num_files: files it has; all of them were looked for, and have the right size if not in *damaged*.
        checked_bytes: how many bytes were read and compared with digests.
        damaged: what is wrong.
        deep: whether everything that was read was also decoded.
        sample: which fraction of the bytes was to be read; the other files may be damaged.
        seed: what chose the files of the sample.
    """

    step: int
    num_files: int
    checked_bytes: int
    damaged: tuple[Damage, ...]
    deep: bool = False
    sample: float = 1.0
    seed: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing that was looked at is damaged; with a *sample* that is not everything."""
        return not self.damaged


@dataclass(frozen=True, slots=True)
class Recovered:
    """What ``recover`` could salvage.

    Attributes:
        info: what the header says; None when it is damaged.
        state: what ``load`` would give, without what is lost: entries of dicts are left out, elements of lists
            and tuples are None. Without a header it is flat: arrays by key.
        lost: one entry per damaged file; ``Damage.tensors`` names what is missing from *state*.
    """

    info: CheckpointInfo | None
    state: dict[str, Any]
    lost: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class MirrorHealth:
    """How the mirror stands, as far as the writer has told.

    Attributes:
        newest: the newest step that is there; None when there is none.
        missing: steps that are to be copied, newest first.
        copying: the step being copied.
        error: why the mirror does not work, or what is damaged in the first root and cannot be copied.
    """

    newest: int | None = None
    missing: tuple[int, ...] = ()
    copying: int | None = None
    error: CheckpointError | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """What a checkpointer is doing now.

    Attributes:
        writer_pid: process that writes; this process when the writer is a thread.
        writer_restarts: how often the writer was replaced since it last committed a step.
        pending_steps: steps being staged or written, oldest first.
        free_slots: staging slots that the next save can take without waiting.
        mirror: the mirror; None without one.
    """

    writer_pid: int
    writer_restarts: int
    pending_steps: tuple[int, ...]
    free_slots: int
    mirror: MirrorHealth | None = None


@dataclass(frozen=True, slots=True)
class IntervalReport:
    """Why an adaptive policy saves as often as it does. Seconds of wall time.

    Attributes:
        interval_s: the time between the begins of two saves.
        cost_s: training time lost per save, as measured and smoothed; 0.0 before the first save.
        durable_s: from the begin of a save until it is durable, likewise.
        overhead: part of the training time that saving takes at this interval.
        reason: what the interval follows from.
    """

    interval_s: float
    cost_s: float = 0.0
    durable_s: float = 0.0
    overhead: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Durations:
    """How long something took, over all times it happened; in seconds.

    Attributes:
        count: how often it happened.
        total_s: sum.
        min_s: shortest, 0.0 when it never happened.
        max_s: longest.
        last_s: the latest.
    """

    count: int = 0
    total_s: float = 0.0
    min_s: float = 0.0
    max_s: float = 0.0
    last_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Average; 0.0 when it never happened."""
        return self.total_s / self.count if self.count else 0.0

    def including(self, seconds: float) -> Durations:
        """These and one more of *seconds*."""
        return Durations(
            count=self.count + 1,
            total_s=self.total_s + seconds,
            min_s=min(self.min_s, seconds) if self.count else seconds,
            max_s=max(self.max_s, seconds),
            last_s=seconds,
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Totals over the life of one checkpointer; see `SaveStats` for units.

    Attributes:
        num_saves: calls of ``save()`` that returned; every one ends in one of the five outcomes below.
        num_durable: saves that were committed.
        num_failed: saves that failed.
        num_skipped: saves given up because every staging slot was taken.
        num_superseded: saves whose place a newer one took.
        num_cancelled: saves that were cancelled in time.
        num_pruned: checkpoints that retention removed.
        num_restores: successful ``restore()`` calls that found a checkpoint.
        num_fallbacks: damaged checkpoints that they skipped for an older one.
        num_writer_restarts: how often a dead or hanging writer was replaced.
        raw_bytes: bytes of the tensors of all durable saves.
        stored_bytes: bytes of the files of all durable saves.
        linked_bytes: those of ``stored_bytes`` that were shared with the previous step.
        blocked: how long ``save()`` kept the caller: the time that training lost.
        stage: from ``save()`` until staged, of durable saves.
        durable: from ``save()`` until durable, of durable saves.
        restore: how long ``restore()`` took.
        last: what the last durable save cost.
        num_mirrored: checkpoints that were copied to the mirror.
        mirrored_bytes: what was written for that.
        last_step: the step it saved.
        policy: what ``when=`` decides and why, if it is adaptive.
    """

    num_saves: int = 0
    num_durable: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_superseded: int = 0
    num_cancelled: int = 0
    num_pruned: int = 0
    num_restores: int = 0
    num_fallbacks: int = 0
    num_writer_restarts: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    linked_bytes: int = 0
    blocked: Durations = Durations()
    stage: Durations = Durations()
    durable: Durations = Durations()
    restore: Durations = Durations()
    last: SaveStats | None = None
    num_mirrored: int = 0
    mirrored_bytes: int = 0
    last_step: int | None = None
    policy: IntervalReport | None = None

    @property
    def blocked_s(self) -> float:
        """How long all calls of ``save()`` together kept training waiting."""
        return self.blocked.total_s
