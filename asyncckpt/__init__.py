"""Asynchronous PyTorch checkpoints as plain Zarr v3, written by a process of their own.

::

    import asyncckpt as ac

    with ac.Checkpointer("runs/gpt2", state={"model": model, "optimizer": optimizer, "rng": ac.RNG()},
                         when=ac.Every(steps=500)) as ckpt:
        found = ckpt.restore()
        for step in range(found.step + 1 if found else 0, total):
            loss = train_step()
            ckpt.step(step, metrics={"loss": loss})

This module is a lazy facade (PEP 562): a name is imported when it is first used. The writer process
and the command line import subpackages of asyncckpt, and must not pay for torch because of that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from asyncckpt.interpreter import collector_paused as _collector_paused

if TYPE_CHECKING:  # what type checkers and editors see; `_HOMES` is what runs, and a test compares the two
    from asyncckpt.checkpointer import Checkpointer, load, open, save_sync
    from asyncckpt.errors import (
        BusyError,
        CheckpointError,
        CheckpointNotFoundError,
        ClosedError,
        CorruptCheckpointError,
        CorruptError,
        ForeignRootError,
        GraphCaptureError,
        InvalidOptionError,
        NonFiniteError,
        NothingCommittedError,
        RootLockedError,
        SaveCancelledError,
        SaveSkippedError,
        SaveSupersededError,
        SnapshotMutatedError,
        StagingError,
        StagingMemoryError,
        StateMismatchError,
        StepExistsError,
        StorageError,
        UnsupportedFormatError,
        UnsupportedStateError,
        UsageError,
        WriterDiedError,
        WriterError,
    )
    from asyncckpt.events import Event
    from asyncckpt.future import SaveFuture
    from asyncckpt.interop import open_zarr
    from asyncckpt.model import (
        CheckpointInfo,
        Damage,
        Durations,
        Health,
        IntervalReport,
        MirrorHealth,
        Mismatch,
        Recovered,
        SaveStats,
        Statistics,
        VerifyReport,
    )
    from asyncckpt.options import Preemption, Staging, Writer
    from asyncckpt.policies import Adaptive, AtSteps, Best, Every, Keep, Mirror, Moment, Validation, When
    from asyncckpt.preemption.workers import shield_worker, shield_workers
    from asyncckpt.provenance import run_metadata
    from asyncckpt.state import RNG, TrainingState, register_type
    from asyncckpt.telemetry import JsonLines

__version__ = "0.1.0"

_HOMES = {
    "asyncckpt.checkpointer": ("Checkpointer", "load", "open", "save_sync"),
    "asyncckpt.errors": (
        "BusyError",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ClosedError",
        "CorruptCheckpointError",
        "CorruptError",
        "ForeignRootError",
        "GraphCaptureError",
        "InvalidOptionError",
        "NonFiniteError",
        "NothingCommittedError",
        "RootLockedError",
        "SaveCancelledError",
        "SaveSkippedError",
        "SaveSupersededError",
        "SnapshotMutatedError",
        "StagingError",
        "StagingMemoryError",
        "StateMismatchError",
        "StepExistsError",
        "StorageError",
        "UnsupportedFormatError",
        "UnsupportedStateError",
        "UsageError",
        "WriterDiedError",
        "WriterError",
    ),
    "asyncckpt.events": ("Event",),
    "asyncckpt.future": ("SaveFuture",),
    "asyncckpt.interop": ("open_zarr",),
    "asyncckpt.model": (
        "CheckpointInfo",
        "Damage",
        "Durations",
        "Health",
        "IntervalReport",
        "MirrorHealth",
        "Mismatch",
        "Recovered",
        "SaveStats",
        "Statistics",
        "VerifyReport",
    ),
    "asyncckpt.options": ("Preemption", "Staging", "Writer"),
    "asyncckpt.policies": ("Adaptive", "AtSteps", "Best", "Every", "Keep", "Mirror", "Moment", "Validation", "When"),
    "asyncckpt.preemption.workers": ("shield_worker", "shield_workers"),
    "asyncckpt.provenance": ("run_metadata",),
    "asyncckpt.state": ("RNG", "TrainingState", "register_type"),
    "asyncckpt.telemetry": ("JsonLines",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "RNG",
    "Adaptive",
    "AtSteps",
    "Best",
    "BusyError",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointNotFoundError",
    "Checkpointer",
    "ClosedError",
    "CorruptCheckpointError",
    "CorruptError",
    "Damage",
    "Durations",
    "Event",
    "Every",
    "ForeignRootError",
    "GraphCaptureError",
    "Health",
    "IntervalReport",
    "InvalidOptionError",
    "JsonLines",
    "Keep",
    "Mirror",
    "MirrorHealth",
    "Mismatch",
    "Moment",
    "NonFiniteError",
    "NothingCommittedError",
    "Preemption",
    "Recovered",
    "RootLockedError",
    "SaveCancelledError",
    "SaveFuture",
    "SaveSkippedError",
    "SaveStats",
    "SaveSupersededError",
    "SnapshotMutatedError",
    "Staging",
    "StagingError",
    "StagingMemoryError",
    "StateMismatchError",
    "Statistics",
    "StepExistsError",
    "StorageError",
    "TrainingState",
    "UnsupportedFormatError",
    "UnsupportedStateError",
    "UsageError",
    "Validation",
    "VerifyReport",
    "When",
    "Writer",
    "WriterDiedError",
    "WriterError",
    "load",
    "open",
    "open_zarr",
    "register_type",
    "run_metadata",
    "save_sync",
    "shield_worker",
    "shield_workers",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _collector_paused():  # beside torch's objects one collection takes as long as half of the imports
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
