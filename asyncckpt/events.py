"""What happens to saves and checkpoints, told to the user's ``on_event`` callbacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from asyncckpt.errors import InvalidOptionError
from asyncckpt.logs import get_logger

__all__ = ["CATALOGUE", "Event", "EventCallback", "EventDispatcher", "EventKind", "event_callbacks"]

_logger = get_logger("asyncckpt")
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `CATALOGUE` lists all there are.

    Attributes:
        name: what, such as ``"save.durable"``.
        step: the training step it is about, if any.
        time: when, in seconds since the epoch.
        fields: details, JSON values only.
    """

    name: str
    step: int | None = None
    time: float = field(default_factory=time.time)
    fields: Mapping[str, Any] = field(default_factory=lambda: _NO_FIELDS)


EventCallback = Callable[[Event], object]


@dataclass(frozen=True, slots=True)
class EventKind:
    """One entry of the catalogue: when the event is told, and its fields with what they mean."""

    when: str
    fields: Mapping[str, str]


_NONCE = {"nonce": "unique name of this save; `CheckpointInfo.nonce` once it is committed"}
_GIVEN_UP = {**_NONCE, "elapsed_s": "seconds since `save()` was called"}
_ERROR = {"error": "the error's stable code, or its type if it is not one of ours", "message": "its message"}

CATALOGUE: Mapping[str, EventKind] = MappingProxyType(
    {
        "checkpointer.opened": EventKind(
            "A `Checkpointer` was made.",
            {
                "root": "directory or URL of the run",
                "run": "identity of this checkpointer, recorded in its checkpoints",
                "writer_pid": "process that writes",
                "num_committed": "checkpoints found in the root",
            },
        ),
        "checkpointer.closed": EventKind("It was closed; no event follows.", {}),
        "save.started": EventKind(
            "`save()` has returned; the event's time is when it was called. First event of every save.",
            {
                **_NONCE,
                "kind": "regular, best, emergency, ...; see `model.KINDS`",
                "blocked_s": "seconds `save()` kept the caller",
            },
        ),
        "save.staged": EventKind(
            "The snapshot is complete and the writer has it: training may change anything.",
            {
                **_NONCE,
                "raw_bytes": "bytes of all tensors",
                "stage_s": "seconds from `save()` until now",
                "blocked_s": "seconds `save()` kept the caller",
            },
        ),
        "save.durable": EventKind(
            "The checkpoint is committed and would survive a power cut. Last event of the save.",
            {
                **_NONCE,
                "kind": "regular, best, emergency, ...; see `model.KINDS`",
                "path": "directory or URL of the step",
                "raw_bytes": "bytes of all tensors",
                "stored_bytes": "bytes of all files of the step",
                "linked_bytes": "those of `stored_bytes` that are shared with the previous step",
                "blocked_s": "seconds `save()` kept the caller",
                "stage_s": "seconds from `save()` until the snapshot was staged",
                "encode_s": "thread-seconds spent compressing and hashing",
                "write_s": "thread-seconds spent in write calls",
                "commit_s": "seconds of flush, header, rename and directory fsyncs",
                "durable_s": "seconds from `save()` until the checkpoint was durable",
                "finite": "false if it holds NaN or infinity, null if nobody looked (`Staging(check_finite=)`)",
                "stale": "true if nothing that is trained has changed since the save before",
                "warnings": "both in words, a list of texts",
            },
        ),
        "save.failed": EventKind(
            "The save failed and nothing was committed. Last event of the save.", {**_GIVEN_UP, **_ERROR}
        ),
        "save.skipped": EventKind('Every staging slot was taken (`when_busy="skip"`). Last event.', _GIVEN_UP),
        "save.superseded": EventKind("A newer save took its place. Last event of the save.", _GIVEN_UP),
        "save.cancelled": EventKind("`SaveFuture.cancel` came in time. Last event of the save.", _GIVEN_UP),
        "checkpoint.pruned": EventKind("Retention removed it.", {"reason": "which rule of `keep=` did not keep it"}),
        "checkpoint.deleted": EventKind("`Checkpointer.delete` removed it.", {}),
        "mirror.copied": EventKind(
            "The checkpoint is committed on the mirror, too, and would survive a power cut there.",
            {
                "elapsed_s": "seconds the copy took",
                "copied_bytes": "bytes written",
                "linked_bytes": "bytes shared with another step of the mirror",
            },
        ),
        "mirror.failed": EventKind(
            "The mirror, or one copy if there is a step, does not work; it is tried again. Told once per trouble.",
            {**_ERROR, "errno": "of the operating system, or null"},
        ),
        "mirror.skipped": EventKind("The checkpoint will not be mirrored.", {"reason": "why not"}),
        "mirror.pruned": EventKind(
            "It was removed from the mirror.", {"reason": "which rule of the mirror's `keep` did not keep it, or else"}
        ),
        "preemption.requested": EventKind(
            "The training was told to stop.",
            {
                "cause": "name of the signal, `preempt()`, or `another rank`",
                "time_left_s": "seconds until the process should be gone",
                "staged_steps": "steps that are not durable yet",
            },
        ),
        "preemption.flush_planned": EventKind(
            "What becomes of the saves that are not durable was planned, or planned differently.",
            {
                "time_left_s": "seconds until the process should be gone",
                "compress": "whether chunks are still compressed",
                "saves": "one object each, in the order of writing: `step`, `makes_it`, `reason`",
            },
        ),
        "preemption.stopped": EventKind("`step()` has saved what could be saved, and `preempted` is true.", {}),
        "preemption.flushed": EventKind(
            "Everything is durable, or the time is up.",
            {"lost_steps": "steps that are not durable", "time_left_s": "seconds that were left"},
        ),
        "restore.done": EventKind(
            "A checkpoint was loaded into the live state.",
            {
                "restore_s": "seconds `restore()` took, without waiting for pending saves",
                "raw_bytes": "bytes of all tensors of the checkpoint",
                "fell_back_from": "newer steps that are damaged and were skipped, newest first",
                "from_mirror": "whether it was read from the mirror",
            },
        ),
        "restore.failed": EventKind(
            "`restore()` raised; the live state is as it was.", {"restore_s": "seconds until then", **_ERROR}
        ),
        "writer.restarted": EventKind(
            "A writer that died or hung was replaced, and was sent all pending saves again.",
            {"reason": "how the one before it ended", "writer_pid": "the new process"},
        ),
        "writer.failed": EventKind("The writer is gone for good; every pending save fails.", _ERROR),
    }
)
"""Every event by name. New ones may be added and get new fields; names and fields are never reused."""


def event_callbacks(on_event: EventCallback | Sequence[EventCallback] | None) -> tuple[EventCallback, ...]:
    """``on_event=`` as a tuple.

    Raises:
        InvalidOptionError: it is, or contains, something that cannot be called.
    """
    if on_event is None:
        return ()
    callbacks = (on_event,) if callable(on_event) else tuple(on_event) if isinstance(on_event, Sequence) else (None,)
    if not all(map(callable, callbacks)):
        raise InvalidOptionError(f"on_event is a function of an Event, or a list of them, not {on_event!r}")
    return callbacks


class EventDispatcher:
    """Calls the callbacks, in order, in the thread where the event happens.

    A callback is a guest in the training loop or in the thread that talks to the writer: it should
    be quick, and whatever it raises is logged and goes no further.
    """

    def __init__(self, *callbacks: EventCallback) -> None:
        self._callbacks = callbacks

    def emit(self, name: str, step: int | None = None, /, **fields: Any) -> None:
        """Tell every callback that this happened just now; costs next to nothing when there is none."""
        if self._callbacks:
            self.tell(Event(name, step, fields=MappingProxyType(fields)))

    def tell(self, event: Event) -> None:
        """Tell every callback."""
        for callback in self._callbacks:
            try:
                callback(event)
            except BaseException as error:
                # Python interrupts the main thread only. Elsewhere neither that nor SystemExit nor a CancelledError
                # may end the thread: it serves the writer.
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise
                _logger.exception("an on_event callback failed on %r", event)

    def __repr__(self) -> str:
        return f"<EventDispatcher of {len(self._callbacks)} callbacks>"
