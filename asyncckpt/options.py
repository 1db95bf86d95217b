"""Option groups: small frozen values, checked once when they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from asyncckpt.errors import InvalidOptionError

__all__ = ["Compression", "Staging", "Writer"]

Compression = Literal["fast", "small", "none"] | list[dict[str, Any]]
"""A preset name, or the Zarr v3 inner codec list to use for every array."""

SnapshotMode = Literal["blocking"]
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
        snapshot: ``"blocking"``: ``save()`` returns when the copy is complete.
        slots: how many snapshots may be staged at once; each is one host copy of the state.
        when_busy: what ``save()`` does when every slot is still being written: ``"wait"`` blocks
            until one is free, ``"skip"`` drops the new save, ``"supersede"`` waits like ``"wait"``
            but lets a still newer save take its place. The outcome is on the future.
        memory_limit: upper bound in bytes for all slots together; ``None`` is no bound.
        threads: copy threads for CPU tensors; ``None`` takes the CPUs this process may use.
    """

    snapshot: SnapshotMode = "blocking"
    slots: int = 1
    when_busy: BusyMode = "wait"
    memory_limit: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _require_choice("Staging.snapshot", self.snapshot, ("blocking",))
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
