"""One save on its way: the listener that turns the writer's answers into the future's outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from asyncckpt.errors import CheckpointError
from asyncckpt.future import SavePromise
from asyncckpt.model import CheckpointInfo, Outcome
from asyncckpt.staging.slots import Slot
from asyncckpt.writer.messages import WriteStats

__all__ = ["SaveFacts", "SaveTicket"]


@dataclass(frozen=True, slots=True)
class SaveFacts:
    """Identity of one save, fixed when ``save()`` was called. ``started`` is a ``perf_counter`` reading."""

    save_id: int
    step: int
    kind: str
    nonce: str
    run: str
    created: datetime
    path: str
    metrics: dict[str, float]
    tags: tuple[str, ...]
    versions: dict[str, str]
    metadata: dict[str, Any]
    started: float

    def info(self, stats: WriteStats, format_version: int) -> CheckpointInfo:
        """What the committed step is known as."""
        return CheckpointInfo(
            step=self.step,
            path=self.path,
            kind=self.kind,
            created=self.created.astimezone(UTC),
            raw_bytes=stats.raw_bytes,
            stored_bytes=stats.stored_bytes,
            num_arrays=stats.num_arrays,
            world_size=1,
            format=format_version,
            nonce=self.nonce,
            run=self.run,
            metrics=self.metrics,
            tags=self.tags,
            versions=self.versions,
            metadata=self.metadata,
            finite=stats.finite,
            warnings=tuple(stats.warnings),
        )


class SaveTicket:
    """Listens to the writer on behalf of one future.

    Its methods run on the client's reader thread and only resolve, count and release.

    Args:
        facts: the save.
        promise: producer side of its future.
        slot: where its snapshot lies.
        raw_bytes: bytes of the whole snapshot.
        format_version: on-disk format the writer uses.
        on_segment_written: a segment of a streamed snapshot was written.
        on_end: called before the future resolves, so that whoever waits for it finds the slot free and
            the statistics complete; gets the error of a failed one.

    Attributes:
        raw_bytes: bytes of the whole snapshot.
        done_bytes: those that are written, as far as the writer has told.
        progressed_at: when it told, a ``monotonic`` reading; 0 before.
        is_streamed: the snapshot passes through less memory than it has, and cannot be written anew.
    """

    def __init__(
        self,
        facts: SaveFacts,
        promise: SavePromise,
        slot: Slot,
        raw_bytes: int,
        format_version: int,
        on_segment_written: Callable[[], None],
        on_end: Callable[[SaveTicket, Outcome, BaseException | None], None],
    ) -> None:
        self.facts = facts
        self.promise = promise
        self.slot = slot
        self.raw_bytes = raw_bytes
        self.done_bytes = 0
        self.progressed_at = 0.0
        self.is_streamed = False
        self._format_version = format_version
        self._on_segment_written = on_segment_written
        self._on_end = on_end

    def note_staged(self) -> bool:
        """The snapshot is complete and with the writer; whether that is news."""
        stage_s = time.perf_counter() - self.facts.started
        return self.promise.set_staged(stage_s=stage_s, raw_bytes=self.raw_bytes)

    def on_progress(self, done_bytes: int) -> None:
        self.done_bytes, self.progressed_at = done_bytes, time.monotonic()
        self.promise.set_progress(done_bytes / self.raw_bytes if self.raw_bytes else 1.0)

    def on_released(self) -> None:
        self._on_segment_written()

    def on_durable(self, stats: WriteStats) -> None:
        self.note_staged()  # the thread that handed it over may not have come to say so
        self.promise.update_stats(
            encode_s=stats.encode_s,
            write_s=stats.write_s,
            commit_s=stats.commit_s,
            durable_s=time.perf_counter() - self.facts.started,
            raw_bytes=stats.raw_bytes,
            stored_bytes=stats.stored_bytes,
            linked_bytes=stats.linked_bytes,
            finite=stats.finite,
            stale=stats.stale,
            warnings=tuple(stats.warnings),
        )
        self._on_end(self, "durable", None)
        self.promise.set_result(self.facts.info(stats, self._format_version))

    def on_failed(self, error: CheckpointError) -> None:
        self._on_end(self, "failed", error)
        self.promise.set_exception(error)

    def on_dropped(self) -> None:
        self._on_end(self, "superseded", None)
        self.promise.set_outcome("superseded", f"step {self.facts.step} was superseded by a newer save")
