"""Messages between trainer and writer: msgspec structs, sent as JSON frames. No pickle.

Trainer to writer: `Configure` once, `Attach`/`Detach` for arenas (the descriptor travels with the
frame), `Save` and `More` for the data of one save, `Drop` to withdraw it, `Unmirror` for a deleted step, `LogLevel`
when it changed, `Hurry` when little time is left, `Close`.
Writer to trainer: `Ready` or `Refused` once, then per save `Released` for each segment but the last,
`Progress`, and exactly one of `Durable`, `Failed` or `Dropped`; `LogRecord`, `Pruned`, `MirrorEvent` and
`MirrorState` at any time, and `Alive` every few seconds while there is something to write.
Every message about a save carries the ``save_id`` the trainer gave it.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = [
    "Alive",
    "Attach",
    "Close",
    "Configure",
    "Detach",
    "Drop",
    "Dropped",
    "Durable",
    "Failed",
    "FromWriter",
    "Hurry",
    "LogLevel",
    "LogRecord",
    "MirrorEvent",
    "MirrorState",
    "MirrorTo",
    "More",
    "Progress",
    "Pruned",
    "Ready",
    "Refused",
    "Released",
    "Save",
    "ToWriter",
    "Unmirror",
    "WriteStats",
]


class MirrorTo(msgspec.Struct, frozen=True):
    """The fields of `policies.mirror.Mirror`, paths absolute; ``keep`` as in `Configure`."""

    root: str
    keep: msgspec.Raw
    mount: str | None
    close_timeout_s: float


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """First message: what to write to, and how.

    ``keep`` holds the fields of `policies.keep.Keep`.
    """

    root: str
    trainer_pid: int
    compression: str | list[dict[str, Any]]
    threads: int | None
    log_level: int
    keep: msgspec.Raw
    incremental: bool = True
    check_finite: bool = False
    mirror: MirrorTo | None = None


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Map an arena. Its descriptor travels with this frame unless ``local``."""

    arena_id: int
    num_bytes: int
    local: bool


class Detach(msgspec.Struct, frozen=True, tag="detach"):
    arena_id: int


class Save(msgspec.Struct, frozen=True, tag="save"):
    """One save. The header fields are those of ``format.header``; ``segment`` is its first part."""

    save_id: int
    step: int
    kind: str
    nonce: str
    run: str
    created: str
    tags: list[str]
    versions: dict[str, str]
    metrics: msgspec.Raw
    metadata: msgspec.Raw
    tree: msgspec.Raw
    stage_s: float
    arena_id: int
    last: bool
    tensors: msgspec.Raw


class More(msgspec.Struct, frozen=True, tag="more"):
    """A further segment of a save that is larger than the staging memory."""

    save_id: int
    arena_id: int
    last: bool
    tensors: msgspec.Raw


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """Withdraw a save if it was not begun yet; the answer is `Dropped`."""

    save_id: int


class LogLevel(msgspec.Struct, frozen=True, tag="log_level"):
    """From now on, send log records of this level and above."""

    level: int


class Unmirror(msgspec.Struct, frozen=True, tag="unmirror"):
    """Delete the step with this nonce on the mirror, too."""

    step: int
    nonce: str


class Hurry(msgspec.Struct, frozen=True, tag="hurry"):
    """Little time is left: write at full speed, these saves first, in this order, compressed or not.

    A save that is being written and is not the first of them is put back, unless it was streamed. The message
    may come again; the newest one counts.
    """

    order: list[int]
    compress: bool


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Finish everything received, then exit."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    pid: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The writer cannot serve this root at all; it exits."""

    error: dict[str, Any]


class Released(msgspec.Struct, frozen=True, tag="released"):
    """The oldest unreleased segment of the save is written; its arena may be filled again."""

    save_id: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    save_id: int
    done_bytes: int


class WriteStats(msgspec.Struct, frozen=True):
    """See `model.SaveStats`."""

    encode_s: float
    write_s: float
    commit_s: float
    raw_bytes: int
    stored_bytes: int
    num_arrays: int
    linked_bytes: int = 0
    finite: bool | None = None
    stale: bool = False
    warnings: list[str] = []


class Durable(msgspec.Struct, frozen=True, tag="durable"):
    save_id: int
    stats: WriteStats


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    save_id: int
    error: dict[str, Any]


class Dropped(msgspec.Struct, frozen=True, tag="dropped"):
    """Answer to `Drop`: whether the save was withdrawn (else it goes on and ends as usual)."""

    save_id: int
    withdrawn: bool


class Pruned(msgspec.Struct, frozen=True, tag="pruned"):
    """Retention removed these steps; the reasons are parallel to them."""

    steps: list[int]
    reasons: list[str]


class MirrorEvent(msgspec.Struct, frozen=True, tag="mirror_event"):
    """Something happened to a step on the mirror; ``fields`` are those of the event ``mirror.<name>``."""

    name: str
    step: int | None
    fields: dict[str, Any]


class MirrorState(msgspec.Struct, frozen=True, tag="mirror_state"):
    """How the mirror stands; see `model.MirrorHealth`. ``error`` is as in `Failed`."""

    newest: int | None = None
    missing: list[int] = []
    copying: int | None = None
    error: dict[str, Any] | None = None


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The writer's event loop runs, whatever the storage does."""


class LogRecord(msgspec.Struct, frozen=True, tag="log"):
    """What the writer logged, on which logger; ``created`` in seconds since the epoch."""

    level: int
    message: str
    logger: str
    created: float


ToWriter = Configure | Attach | Detach | Save | More | Drop | Unmirror | LogLevel | Hurry | Close
FromWriter = (
    Ready | Refused | Released | Progress | Durable | Failed | Dropped | Pruned | MirrorEvent | MirrorState | Alive
    | LogRecord
)  # fmt: skip
