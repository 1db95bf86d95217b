"""What a checkpointer is doing now."""

from __future__ import annotations

from dataclasses import dataclass

from asyncckpt.errors import CheckpointError

__all__ = ["Health", "MirrorHealth"]


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
