"""Runs saves: orders the snapshot in the caller's thread, hands it to the writer in another once it is complete."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from asyncckpt.checkpointer.ticket import SaveFacts, SaveTicket
from asyncckpt.errors import BusyError, CheckpointError, UsageError, WriterError
from asyncckpt.format.header import FORMAT
from asyncckpt.format.tree import encode_value
from asyncckpt.future import SaveFuture, SavePromise, serve_futures, serves_futures
from asyncckpt.logs import get_logger
from asyncckpt.memory import available_memory
from asyncckpt.model import Health, Outcome
from asyncckpt.options import Staging
from asyncckpt.restore.scratch import Memory, Scratch
from asyncckpt.staging.plan import SegmentPlan, StagingPlan
from asyncckpt.staging.slots import Slot, SlotPool
from asyncckpt.staging.stager import Copies, Stager
from asyncckpt.state.capture import Capture, capture
from asyncckpt.writer.client import WriterClient
from asyncckpt.writer.messages import Hurry, More, Save

__all__ = ["SaveCoordinator"]

_logger = get_logger("asyncckpt")

_SPARE_MEMORY = 1.5
"""Times the size of a slot that must be available before one is added: the kernel kills who takes the last."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A captured state and where its tensors go."""

    capture: Capture
    plan: StagingPlan


class SaveCoordinator:
    """Owns the staging slots and every save that has not ended.

    One caller at a time takes snapshots (``_save_lock``); ``_lock`` guards the bookkeeping, which
    the client's reader thread changes when saves end.

    Args:
        client: the writer.
        options: staging options.
        shared: whether staging memory must be visible to another process.
        on_staged: hears of each save whose snapshot is complete.
        on_end: hears of each save just before its future resolves, and of the error if it failed.
    """

    def __init__(
        self,
        client: WriterClient,
        options: Staging,
        *,
        shared: bool,
        on_staged: Callable[[SavePromise], None],
        on_end: Callable[[SavePromise, Outcome, BaseException | None], None],
    ) -> None:
        self._client = client
        self._options = options
        self._on_staged = on_staged
        self._on_end = on_end
        self._pool = SlotPool(options.slots)
        self._stager = Stager(options, shared=shared, attach=client.attach, detach=client.detach)
        self._save_lock = threading.Lock()
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._pending: dict[int, SaveTicket] = {}
        self._segment_written = threading.Condition()
        self._num_segments_written: dict[int, int] = {}
        self._is_prepared = False
        self._hand_overs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._has_handed_over = threading.Event()  # all of them; not `Thread.join`, see `WriterClient`
        threading.Thread(target=self._run_hand_overs, name="asyncckpt-stager", daemon=True).start()

    # -- saving --------------------------------------------------------------------------------

    def next_id(self) -> int:
        """A new ``save_id``."""
        return next(self._ids)

    def save(self, facts: SaveFacts, state: Mapping[str, Any], promise: SavePromise) -> None:
        """Snapshot *state* and start writing it; *promise* hears how it ends.

        Raises:
            UsageError: the state or an option cannot be honoured. Any other failure is on the future.
            BusyError: called from a callback while every slot is taken.
        """
        self._stager.require_no_capture()
        with self._one_save():
            slot = self._pool.acquire("skip" if serves_futures() else self._options.when_busy, self._supersede_newest)
            if slot is None and serves_futures() and self._options.when_busy != "skip":
                raise _busy_in_callback(facts.step)
            if slot is None:
                self._finish(promise, "skipped")
                promise.set_outcome("skipped", f"step {facts.step} was skipped: every staging slot is being written")
            else:
                self._begin(facts, state, promise, slot)
        promise.update_stats(blocked_s=time.perf_counter() - facts.started)

    @contextlib.contextmanager
    def _one_save(self) -> Iterator[None]:
        # Whoever has the lock may be waiting for a slot, which the thread of a callback would have to free.
        if not self._save_lock.acquire(blocking=not serves_futures()):
            raise BusyError("a callback cannot save while another thread is in save()")
        try:
            yield
        finally:
            self._save_lock.release()

    def _begin(self, facts: SaveFacts, state: Mapping[str, Any], promise: SavePromise, slot: Slot) -> None:
        try:
            snapshot = self._capture(state)
            self._stager.reserve(slot, snapshot.plan)
        except UsageError:
            self._pool.release(slot)
            raise
        except CheckpointError as error:
            self._pool.release(slot)
            self._finish(promise, "failed", error)
            promise.set_exception(error)
            return
        ticket = SaveTicket(
            facts,
            promise,
            slot,
            snapshot.plan.raw_bytes,
            FORMAT,
            lambda: self._note_segment_written(facts.save_id),
            self._end,
        )
        with self._lock:
            self._pending[facts.save_id] = ticket
        try:
            self._stage(ticket, snapshot)
        except CheckpointError as error:
            ticket.on_failed(error)
        except BaseException as error:
            self._end(ticket, "failed", error)
            raise

    def _capture(self, state: Mapping[str, Any]) -> _Snapshot:
        captured = capture(state)
        return _Snapshot(captured, self._stager.plan(captured.leaves))

    def _stage(self, ticket: SaveTicket, snapshot: _Snapshot) -> None:
        segments = snapshot.plan.segments
        if len(segments) > 1:
            self._stream(ticket, snapshot, segments)
            return
        tree = snapshot.capture.tree
        copies = self._stager.begin(snapshot.capture.leaves, segments[0], ticket.slot, snapshot.capture.optimizers)
        # Another thread waits for the devices, encodes the tree and sends it: neither they nor a writer that does
        # not read must block us. It must not be given the tensors: its last job stays with it until the next.
        self._hand_overs.put(lambda: self._hand_over(ticket, tree, segments[0], copies))

    def _hand_over(self, ticket: SaveTicket, tree: Any, segment: SegmentPlan, copies: Copies) -> None:
        error: CheckpointError | None = None
        try:
            copies.wait()
        except CheckpointError as failure:
            error = failure
        if not ticket.promise.claim():
            self._end(ticket, "cancelled")
            return
        try:
            if error is not None:
                raise error
            self._submit(ticket, tree, segment, last=True)
        except CheckpointError as error:
            ticket.on_failed(error)
        except Exception as error:
            # Nobody else would tell the future: without this, who waits for it waits for ever.
            _logger.exception("step %d could not be handed to the writer", ticket.facts.step)
            ticket.on_failed(WriterError(f"step {ticket.facts.step} could not be handed to the writer: {error!r}"))
        else:
            self._note_staged(ticket)

    def _stream(self, ticket: SaveTicket, snapshot: _Snapshot, segments: Sequence[SegmentPlan]) -> None:
        """Pass a state larger than the staging memory through two arenas in turn; blocks for the rest."""
        ticket.promise.claim()
        ticket.is_streamed = True
        self._num_segments_written[ticket.facts.save_id] = 0
        try:
            self._stream_segments(ticket, snapshot, segments)
        except BaseException:
            self._client.abandon(ticket.facts.save_id)
            raise
        finally:
            del self._num_segments_written[ticket.facts.save_id]

    def _stream_segments(self, ticket: SaveTicket, snapshot: _Snapshot, segments: Sequence[SegmentPlan]) -> None:
        for index, segment in enumerate(segments):
            if not self._wait_segments_written(ticket, index - 1):
                return
            arena = ticket.slot.arenas[index % 2]
            self._stager.copy(snapshot.capture.leaves, segment, ticket.slot, arena)
            last = index == len(segments) - 1
            if index == 0:
                self._submit(ticket, snapshot.capture.tree, segment, last=last)
            else:
                self._client.submit_more(More(ticket.facts.save_id, arena.arena_id, last, segment.specs))
        self._note_staged(ticket)

    def _submit(self, ticket: SaveTicket, tree: Any, segment: SegmentPlan, *, last: bool) -> None:
        facts = ticket.facts
        self._client.submit(
            Save(
                save_id=facts.save_id,
                step=facts.step,
                kind=facts.kind,
                nonce=facts.nonce,
                run=facts.run,
                created=facts.created.isoformat(),
                tags=list(facts.tags),
                versions=facts.versions,
                metrics=_encode(facts.metrics),
                metadata=_encode(facts.metadata),
                tree=msgspec.Raw(msgspec.json.encode(tree)),
                stage_s=time.perf_counter() - facts.started,
                arena_id=ticket.slot.arenas[0].arena_id,
                last=last,
                tensors=segment.specs,
            ),
            ticket,
        )

    def _note_staged(self, ticket: SaveTicket) -> None:
        if ticket.note_staged():
            self._on_staged(ticket.promise)

    def _note_segment_written(self, save_id: int) -> None:
        with self._segment_written:
            if save_id in self._num_segments_written:
                self._num_segments_written[save_id] += 1
            self._segment_written.notify_all()

    def _wait_segments_written(self, ticket: SaveTicket, count: int) -> bool:
        save_id = ticket.facts.save_id
        with self._segment_written:
            self._segment_written.wait_for(
                lambda: save_id not in self._pending or self._num_segments_written[save_id] >= count
            )
        return save_id in self._pending

    def _supersede_newest(self) -> bool:
        with self._lock:
            newest = next(reversed(self._pending.values()), None)
        if newest is None:
            return False
        # Only a save the writer knows can be withdrawn from it.
        with contextlib.suppress(CheckpointError):
            newest.promise.future.wait_staged()
        return self._client.drop(newest.facts.save_id)

    # -- the end of a save -----------------------------------------------------------------------

    def _end(self, ticket: SaveTicket, outcome: Outcome, error: BaseException | None = None) -> None:
        with self._lock:
            if self._pending.pop(ticket.facts.save_id, None) is None:
                return
        self._pool.release(ticket.slot)
        self._finish(ticket.promise, outcome, error)

    def _finish(self, promise: SavePromise, outcome: Outcome, error: BaseException | None = None) -> None:
        with self._segment_written:
            self._segment_written.notify_all()
        self._on_end(promise, outcome, error)

    # -- everything else -------------------------------------------------------------------------

    @property
    def tickets(self) -> list[SaveTicket]:
        """All saves that have not ended, oldest first."""
        with self._lock:
            return list(self._pending.values())

    @property
    def pending(self) -> list[SavePromise]:
        """The promises of `tickets`."""
        return [ticket.promise for ticket in self.tickets]

    def hurry(self, message: Hurry) -> None:
        """See `WriterClient.hurry`."""
        self._client.hurry(message)

    def make_room(self, timeout: float) -> bool:
        """Have a slot free for a save that is the last chance; whether there is one within *timeout* seconds.

        Adds one beyond ``Staging.slots`` if the machine has the memory: what is staged stays staged.
        """
        if not self._pool.num_free and self._options.memory_limit is None:
            needed = max(slot.num_bytes for slot in self._pool.slots)
            if available_memory() > _SPARE_MEMORY * needed:
                self._pool.add()
        return self._pool.wait_free(timeout)

    @property
    def futures(self) -> list[SaveFuture]:
        """The futures of `pending`."""
        return [promise.future for promise in self.pending]

    def health(self) -> Health:
        """What is going on now."""
        return Health(
            writer_pid=self._client.pid,
            writer_restarts=self._client.num_restarts,
            pending_steps=tuple(promise.future.step for promise in self.pending),
            free_slots=self._pool.num_free,
        )

    def forget_on_mirror(self, step: int, nonce: str) -> None:
        """*step* was deleted, and is to be deleted on the mirror as well."""
        self._client.unmirror(step, nonce)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Commit the staging memory for *state* in the background, once, ahead of the first save."""
        if self._is_prepared or self._stager.is_capturing():
            return
        self._is_prepared = True
        with self._save_lock, contextlib.suppress(CheckpointError):
            snapshot = self._capture(state)
            for slot in self._pool.slots:
                self._stager.prepare(slot, snapshot.plan, snapshot.capture.leaves, snapshot.capture.optimizers)

    @contextlib.contextmanager
    def lent_memory(self) -> Iterator[Memory]:
        """Staging memory for a restore to decode into while nothing is staged there.

        A run that restores is about to save: the pages it commits here need not be committed then.
        """
        slot = self._pool.take()
        try:
            yield Scratch(lambda num_bytes: self._stager.lend(slot, num_bytes))
        finally:
            self._pool.release(slot)

    def _run_hand_overs(self) -> None:
        serve_futures()
        try:
            while (hand_over := self._hand_overs.get()) is not None:
                hand_over()
        finally:
            self._has_handed_over.set()

    def close(self, timeout: float) -> bool:
        """Let the writer finish and free the staging memory; whether that worked within *timeout*. Repeatable."""
        self._hand_overs.put(None)
        deadline = time.monotonic() + timeout
        if not self._has_handed_over.wait(timeout) or not self._client.close(max(0.0, deadline - time.monotonic())):
            return False
        self._stager.close(self._pool.slots)
        return True


def _busy_in_callback(step: int) -> BusyError:
    return BusyError(f"step {step} is not saved: a callback cannot wait for a staging slot; Staging(slots=) adds some")


def _encode(values: Mapping[str, Any]) -> msgspec.Raw:
    def refuse(value: object, path: str) -> None:
        return None

    return msgspec.Raw(msgspec.json.encode(encode_value(dict(values), "", refuse)))
