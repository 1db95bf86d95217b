"""Option groups: small frozen values, checked once when they are built."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from asyncckpt.errors import InvalidOptionError

__all__ = ["BusyMode", "Compression", "Preemption", "SnapshotMode", "Staging", "Writer"]

Compression = Literal["fast", "small", "none"] | list[dict[str, Any]]
"""A preset name, or the Zarr v3 inner codec list to use for every array."""

SnapshotMode = Literal["auto", "overlap", "device", "blocking"]
BusyMode = Literal["wait", "skip", "supersede"]
WriterKind = Literal["process", "thread"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidOptionError(message)


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Staging:
    """How a snapshot is taken.

    Attributes:
        snapshot: how tensors on CUDA devices are copied; see ``docs/snapshots.md``. ``"overlap"``: while training goes
            on; the optimizers in the state wait for it on the device, in their next ``step()``. ``"device"``: within
            the device first, when its memory allows, else like ``"overlap"``. ``"auto"``: ``"device"`` when that leaves
            ample memory, else ``"overlap"``. ``"blocking"``: ``save()`` returns when the copy is complete, as it
            always does for tensors elsewhere.
        slots: how many snapshots may be staged at once; each is one host copy of the state.
        when_busy: what ``save()`` does when every slot is still being written: ``"wait"`` blocks
            until one is free, ``"skip"`` drops the new save, ``"supersede"`` waits like ``"wait"``
            but lets a still newer save take its place. The outcome is on the future.
        memory_limit: upper bound in bytes for all slots together; ``None`` is no bound.
        threads: copy threads for CPU tensors; ``None`` takes the CPUs this process may use.
        check_finite: whether each snapshot is searched for NaN and infinity, by the writer; the checkpoint is
            saved all the same, marked, and passed over by ``restore(finite=True)`` and ``"best"``.
    """

    snapshot: SnapshotMode = "auto"
    slots: int = 1
    when_busy: BusyMode = "wait"
    memory_limit: int | None = None
    threads: int | None = None
    check_finite: bool = False

    def __post_init__(self) -> None:
        _require(isinstance(self.check_finite, bool), f"Staging.check_finite must be a bool, not {self.check_finite!r}")
        _require_choice("Staging.snapshot", self.snapshot, get_args(SnapshotMode))
        _require_choice("Staging.when_busy", self.when_busy, ("wait", "skip", "supersede"))
        _require(self.slots >= 1, f"Staging.slots must be at least 1, not {self.slots}")
        _require(self.memory_limit is None or self.memory_limit > 0, "Staging.memory_limit must be positive")
        _require(self.threads is None or self.threads >= 1, "Staging.threads must be at least 1")


@dataclass(frozen=True, slots=True)
class Writer:
    """Where and how snapshots are written.

    Attributes:
        kind: ``"process"`` runs the writer as its own process; ``"thread"`` runs the same pipeline
            in this process (platforms without descriptor passing, and tests).
        threads: threads that compress and write; ``None`` lets as many compress as there are CPUs that nobody
            else uses at the moment, at least one and at most eight, while others write.
        nice: niceness of the writer process, 0 to 19.
        restarts: how often a writer that died or was stopped is replaced before a save fails with
            `WriterDiedError`; the count starts anew with every committed save.
        stall_timeout_s: how long the storage may take nothing of a save before it fails with a
            `StorageError` (``ETIMEDOUT``) and the writer is replaced; ``None`` waits for ever. Not for
            ``kind="thread"``: a thread stuck in the kernel cannot be got rid of.
        lock_timeout_s: how long to wait for a writer of a dead run that still holds the root.
        on_error: ``"raise"``: `Checkpointer.step` and `Checkpointer.save` raise the error of an earlier
            save that failed and that nobody looked at; ``"warn"``: they warn.
        incremental: link files that did not change since the previous step instead of writing them again,
            where the file system has hard links. Every step stays complete, but steps then share the
            files, and damage to a shared one damages all of them.
    """

    kind: WriterKind = "process"
    threads: int | None = None
    nice: int = 10
    restarts: int = 10
    stall_timeout_s: float | None = 600.0
    lock_timeout_s: float = 60.0
    on_error: Literal["raise", "warn"] = "raise"
    incremental: bool = True

    def __post_init__(self) -> None:
        _require_choice("Writer.kind", self.kind, ("process", "thread"))
        _require_choice("Writer.on_error", self.on_error, ("raise", "warn"))
        _require(self.threads is None or self.threads >= 1, "Writer.threads must be at least 1")
        _require(0 <= self.nice <= 19, f"Writer.nice must be 0 to 19, not {self.nice}")
        _require(self.restarts >= 0, "Writer.restarts must not be negative")
        _require(self.stall_timeout_s is None or self.stall_timeout_s > 0, "Writer.stall_timeout_s must be positive")
        _require(self.lock_timeout_s >= 0, "Writer.lock_timeout_s must not be negative")
        _require(isinstance(self.incremental, bool), f"Writer.incremental must be a bool, not {self.incremental!r}")


@dataclass(frozen=True, slots=True)
class Preemption:
    """What happens when the training is told to stop.

    Attributes:
        signals: those that tell it. Handlers that were installed before are called too.
        grace: seconds from the signal to the kill; or a mapping from signal to seconds, for schedulers that send
            an early one. A tenth of it is kept for the process to end.
        on_preempted: called with the step after which `Checkpointer.preempted` turned true, in the training
            thread, when its save is staged.
        repeat_s: a signal that comes again after so many seconds means "leave now". One that comes sooner is
            taken for the same: launchers and schedulers often both send it.
    """

    signals: tuple[int, ...] = (signal.SIGTERM,)
    grace: float | Mapping[int, float] = 15.0
    on_preempted: Callable[[int], object] | None = None
    repeat_s: float = 5.0

    def __post_init__(self) -> None:
        for signum in self.signals:
            _require(_can_be_handled(signum), f"Preemption.signals: {signum!r} is no signal that can be handled")
        graces = list(self.grace.values()) if isinstance(self.grace, Mapping) else [self.grace]
        _require(bool(graces) and min(graces) > 0, f"Preemption.grace must be positive, not {self.grace!r}")
        if isinstance(self.grace, Mapping):
            lacking = [signal.Signals(signum).name for signum in self.signals if signum not in self.grace]
            _require(not lacking, f"Preemption.grace says nothing about {', '.join(lacking)}")
        _require(self.repeat_s >= 0, "Preemption.repeat_s must not be negative")

    def grace_of(self, signum: int | None) -> float:
        """Seconds from *signum* to the kill; None is a request by hand, for which the shortest one holds."""
        if not isinstance(self.grace, Mapping):
            return self.grace
        return min(self.grace.values()) if signum is None else self.grace[signum]


def _can_be_handled(signum: int) -> bool:
    never = {getattr(signal, name) for name in ("SIGKILL", "SIGSTOP") if hasattr(signal, name)}
    return signum in signal.valid_signals() and signum not in never
