"""The writer's side of the conversation: receives saves, runs the pipeline, answers.

State ownership: everything here is touched only by the event loop; threads get immutable jobs.
The same service runs in the writer process and, for ``Writer(kind="thread")``, in a thread.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import anyio
import anyio.to_thread
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncckpt.errors import CheckpointError, WriterDiedError, error_to_fields
from asyncckpt.logs import get_logger
from asyncckpt.memory import Arena
from asyncckpt.policies.keep import Keep
from asyncckpt.policies.mirror import Mirror
from asyncckpt.repository.retention import Decision
from asyncckpt.repository.root import discard_partials
from asyncckpt.stores import open_store
from asyncckpt.stores.contract import Store
from asyncckpt.writer.framing import FrameBuffer, receive_frames, send_frame
from asyncckpt.writer.logs import LogBuffer
from asyncckpt.writer.messages import (
    Alive,
    Attach,
    Close,
    Configure,
    Detach,
    Drop,
    Dropped,
    Durable,
    Failed,
    FromWriter,
    Hurry,
    LogLevel,
    More,
    Progress,
    Pruned,
    Ready,
    Refused,
    Released,
    Save,
    ToWriter,
    Unmirror,
    WriteStats,
)
from asyncckpt.writer.mirroring import Mirroring
from asyncckpt.writer.pipeline import Pipeline, Segment
from asyncckpt.writer.pruning import Pruner
from asyncckpt.writer.retry import retry_delay
from asyncckpt.writer.urgency import PutBackError, Urgency, raise_priority

__all__ = ["serve"]

_PROGRESS_INTERVAL_S = 0.25
_ALIVE_INTERVAL_S = 5.0
_logger = get_logger("asyncckpt.writer")

_Part = Save | More


class _PendingSave:
    """A save received but not finished; its segments arrive in a stream."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.begun = False
        self.send, self.receive = anyio.create_memory_object_stream[_Part](max_buffer_size=1_000_000)

    def close(self) -> None:
        self.send.close()
        self.receive.close()


async def serve(sock: socket.socket) -> None:
    """Serve one trainer on the non-blocking *sock* until it closes or dies, then finish and return."""
    frames: FrameBuffer[ToWriter] = FrameBuffer(msgspec.json.Decoder(ToWriter))
    first = await receive_frames(sock, frames)
    while first == []:
        first = await receive_frames(sock, frames)
    if not first:
        return
    configure, *rest = first
    try:
        store = await anyio.to_thread.run_sync(open_store, configure.root)
        service = _Service(sock, frames, store, configure)
    except CheckpointError as error:
        await send_frame(sock, Refused(error_to_fields(error)))
        return
    await service.run(rest)


class _Service:
    def __init__(self, sock: socket.socket, frames: FrameBuffer[ToWriter], store: Store, configure: Configure) -> None:
        self._sock = sock
        self._frames = frames
        self._store = store
        self._pruner = Pruner(store, msgspec.json.decode(configure.keep, type=Keep))
        self._mirroring = Mirroring(
            store, _mirror(configure), self._send, self._prune, incremental=configure.incremental
        )
        self._trainer_pid = configure.trainer_pid
        self._urgency = Urgency()
        self._hurry: Hurry | None = None
        self._hurried = anyio.Event()
        self._current: _PendingSave | None = None
        self._pipeline = Pipeline(
            store,
            configure.compression,  # type: ignore[arg-type]
            configure.threads,
            incremental=configure.incremental,
            check_finite=configure.check_finite,
            is_own_process=configure.trainer_pid != os.getpid(),
            urgency=self._urgency,
        )
        self._arenas: dict[int, Arena] = {}
        self._pending: dict[int, _PendingSave] = {}
        self._queue_in: MemoryObjectSendStream[_PendingSave]
        self._queue: MemoryObjectReceiveStream[_PendingSave]
        self._queue_in, self._queue = anyio.create_memory_object_stream[_PendingSave](1_000_000)
        self._send_lock = anyio.Lock()
        self._prune_lock = anyio.Lock()
        self._logs = LogBuffer()
        if configure.trainer_pid != os.getpid():  # as a thread it logs where the trainer does
            self._logs.install(configure.log_level)

    async def run(self, received: list[ToWriter]) -> None:
        try:
            await self._run(received)
        finally:
            self._queue_in.close()
            self._queue.close()
            for pending in self._pending.values():
                pending.close()
            for arena in self._arenas.values():
                if arena.fd >= 0:  # the trainer owns the others
                    arena.close()

    async def _run(self, received: list[ToWriter]) -> None:
        await self._send(Ready(os.getpid()))
        for message in received:
            await self._dispatch(message)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._receive)
            tasks.start_soon(self._watch_trainer)
            tasks.start_soon(self._tell_alive)
            tasks.start_soon(self._mirroring.run)
            tasks.start_soon(self._tell_progress)
            await self._write_all()
            await self._mirroring.finish()
            await self._send_logs()
            tasks.cancel_scope.cancel()

    async def _receive(self) -> None:
        while (messages := await receive_frames(self._sock, self._frames)) is not None:
            for message in messages:
                await self._dispatch(message)
        self._end_of_input()

    async def _watch_trainer(self) -> None:
        # The socket alone is not enough: a forked child of the trainer may hold its end open.
        if self._trainer_pid == os.getpid() or not hasattr(os, "pidfd_open"):
            return
        try:
            descriptor = os.pidfd_open(self._trainer_pid)
        except OSError:
            return
        try:
            await anyio.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        # What the trainer sent before it died is still in the socket; let the receiver drain it first.
        while select.select([self._sock], [], [], 0)[0] and not self._queue_in_closed:
            await anyio.lowlevel.checkpoint()
        self._end_of_input()

    async def _tell_alive(self) -> None:
        while True:
            await anyio.sleep(_ALIVE_INTERVAL_S)
            await self._send_logs()
            if self._pending:
                await self._send(Alive())

    async def _tell_progress(self) -> None:
        """What is planned in a hurry is planned by what the storage takes now, within large files too."""
        await self._hurried.wait()
        told = 0
        while True:
            await anyio.sleep(_PROGRESS_INTERVAL_S)
            if self._current is not None and self._urgency.done_bytes != told:
                told = self._urgency.done_bytes
                await self._send(Progress(self._current.save.save_id, told))

    async def _send_logs(self) -> None:
        for record in self._logs.take():
            await self._send(record)

    @property
    def _queue_in_closed(self) -> bool:
        return self._queue_in.statistics().open_send_streams == 0

    def _end_of_input(self) -> None:
        self._queue_in.close()
        for pending in self._pending.values():
            pending.send.close()

    async def _dispatch(self, message: ToWriter) -> None:
        match message:
            case Attach(arena_id=arena_id, num_bytes=num_bytes, local=local):
                self._arenas[arena_id] = (
                    Arena.find_local(arena_id)
                    if local
                    else Arena.attach(arena_id, num_bytes, self._frames.descriptors.pop(0))
                )
            case Detach(arena_id=arena_id):
                arena = self._arenas.pop(arena_id)
                if arena.fd >= 0:
                    arena.close()
            case Save():
                pending = self._pending[message.save_id] = _PendingSave(message)
                self._add_part(pending, message)
                self._queue_in.send_nowait(pending)
                self._put_back_if_late()
            case More(save_id=save_id):
                # Parts of a save that failed meanwhile are no longer wanted.
                if (pending_or_none := self._pending.get(save_id)) is not None:
                    self._add_part(pending_or_none, message)
            case Drop(save_id=save_id):
                await self._drop(save_id)
            case LogLevel(level=level):
                if self._trainer_pid != os.getpid():
                    self._logs.install(level)
            case Unmirror(step=step, nonce=nonce):
                self._mirroring.withdraw(step, nonce)
            case Hurry():
                self._take_hurry(message)
            case Close():
                self._end_of_input()

    def _add_part(self, pending: _PendingSave, part: _Part) -> None:
        pending.send.send_nowait(part)
        if part.last:
            pending.send.close()

    async def _drop(self, save_id: int) -> None:
        pending = self._pending.get(save_id)
        withdrawn = False
        if pending is not None:
            # A snapshot that is still being streamed ends here, incomplete, and is not committed.
            pending.send.close()
            withdrawn = not pending.begun
            if withdrawn:
                del self._pending[save_id]
                pending.close()
        await self._send(Dropped(save_id, withdrawn))

    def _take_hurry(self, hurry: Hurry) -> None:
        self._hurry = hurry
        self._urgency.compress = hurry.compress
        self._pipeline.hurry()
        if self._trainer_pid != os.getpid():
            raise_priority()
        self._hurried.set()
        self._put_back_if_late()

    def _put_back_if_late(self) -> None:
        """Interrupt what is being written if a `Hurry` wants another save before it."""
        current, first = self._current, self._next()
        if current is not None and current.save.last and first is not None and self._is_before(first, current):
            self._urgency.put_back()

    def _is_before(self, one: _PendingSave, other: _PendingSave) -> bool:
        order = [] if self._hurry is None else self._hurry.order
        ids = [pending.save.save_id for pending in (one, other)]
        return set(ids) <= set(order) and order.index(ids[0]) < order.index(ids[1])

    def _next(self) -> _PendingSave | None:
        """The save to begin now: as a `Hurry` says, else the oldest."""
        waiting = [pending for pending in self._pending.values() if not pending.begun]
        order = {} if self._hurry is None else {save_id: place for place, save_id in enumerate(self._hurry.order)}
        return min(waiting, key=lambda pending: order.get(pending.save.save_id, len(order)), default=None)

    async def _write_all(self) -> None:
        await self._discard_partials()
        async for _ in self._queue:  # one more; which one is written first is another question
            while (pending := self._next()) is not None:
                pending.begun = True
                with self._mirroring.held():
                    is_durable = await self._write_one(pending)
                # Nothing that is not a save may stand in the way of one when there is little time.
                if is_durable and (self._hurry is None or not self._pending):
                    await self._prune()
                await self._send_logs()

    async def _discard_partials(self) -> None:
        # A writer before this one may have been killed in a save that nobody repeats (streamed, or stalled).
        try:
            await anyio.to_thread.run_sync(discard_partials, self._store)
        except CheckpointError as error:
            _logger.warning("an unfinished step stays behind: %s", error)

    async def _write_one(self, pending: _PendingSave) -> bool:
        save = pending.save
        self._current = pending
        try:
            stats = await self._write_with_retries(pending)
        except PutBackError:
            pending.begun = False
            return False
        except Exception as error:
            _logger.debug("step %d failed", save.step, exc_info=error)
            await self._send(Failed(save.save_id, error_to_fields(error)))
            return False
        else:
            self._pruner.forget(save.step)
            self._mirroring.note_committed(save.step, save.nonce)
            await self._send(Durable(save.save_id, stats))
            return True
        finally:
            self._current = None
            if pending.begun:
                self._pending.pop(save.save_id, None)
                pending.close()

    async def _write_with_retries(self, pending: _PendingSave) -> WriteStats:
        save = pending.save
        report = self._progress_reporter(save.save_id)
        first: BaseException | None = None
        attempt = 0
        while True:
            try:
                return await self._pipeline.write(save, self._segments(pending), report, attempt)
            except Exception as error:
                cause = _first_cause(error)
            if isinstance(cause, PutBackError):
                raise cause
            # A streamed snapshot is gone with the segments that were reused.
            delay_s = retry_delay(cause, attempt) if save.last else None
            first = first or cause
            if delay_s is None:
                # What stood in the way first says more than what a repetition ran into.
                raise first
            _logger.warning("step %d: %s; trying again in %s s", save.step, cause, delay_s)
            await self._send_logs()
            await anyio.sleep(delay_s)
            attempt += 1

    async def _segments(self, pending: _PendingSave) -> AsyncIterator[Segment]:
        save_id = pending.save.save_id
        if pending.save.last:
            # All of it is here, and stays here for further attempts.
            yield Segment(pending.save.tensors, self._arenas[pending.save.arena_id].buffer, _nothing_to_release)
            return
        last = False
        async for part in pending.receive:
            last = part.last

            async def release(last: bool = last) -> None:
                if not last:
                    await self._send(Released(save_id))

            yield Segment(part.tensors, self._arenas[part.arena_id].buffer, release)
        if not last:
            raise WriterDiedError(
                f"the trainer ended while step {pending.save.step} was still being staged", step=pending.save.step
            )

    def _progress_reporter(self, save_id: int) -> Callable[[int], Awaitable[None]]:
        last_sent = time.monotonic()

        async def report(done_bytes: int) -> None:
            nonlocal last_sent
            now = time.monotonic()
            if now - last_sent >= _PROGRESS_INTERVAL_S and not self._hurried.is_set():
                last_sent = now
                await self._send(Progress(save_id, done_bytes))

        return report

    async def _prune(self) -> None:
        async with self._prune_lock:  # after a save and after a copy, which know nothing of each other
            await self._prune_now()

    async def _prune_now(self) -> None:
        removed: list[Decision] = []
        failure: CheckpointError | None
        try:
            removed, failure = await anyio.to_thread.run_sync(
                self._pruner.run, datetime.now(UTC), self._mirroring.in_use
            )
        except CheckpointError as error:
            failure = error
        if failure is not None:
            # The save is durable all the same; retention is tried again after the next one.
            _logger.warning("retention failed: %s", failure)
        if removed:
            await self._send(Pruned([decision.step for decision in removed], [decision.reason for decision in removed]))

    async def _send(self, message: FromWriter) -> None:
        async with self._send_lock:
            await send_frame(self._sock, message)


def _mirror(configure: Configure) -> Mirror | None:
    found = configure.mirror
    if found is None:
        return None
    return Mirror(found.root, msgspec.json.decode(found.keep, type=Keep), found.mount, found.close_timeout_s)


async def _nothing_to_release() -> None:
    """The trainer learns from the save's end that its arena is free."""


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
