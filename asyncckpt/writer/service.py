"""The writer's side of the conversation: receives saves, runs the pipeline, answers.

State ownership: everything here is touched only by the event loop; threads get immutable jobs.
The same service runs in the writer process and, for ``Writer(kind="thread")``, in a thread.
"""

from __future__ import annotations

import os
import select
import socket
from datetime import UTC, datetime

import anyio
import anyio.to_thread
import msgspec

from asyncckpt.errors import CheckpointError, error_to_fields
from asyncckpt.logs import get_logger
from asyncckpt.policies.keep import Keep
from asyncckpt.policies.mirror import Mirror
from asyncckpt.repository.retention import Decision
from asyncckpt.repository.root import discard_partials
from asyncckpt.stores import open_store
from asyncckpt.stores.contract import Store
from asyncckpt.writer.arenas import Arenas
from asyncckpt.writer.attempts import PROGRESS_INTERVAL_S, Attempts
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
    Save,
    ToWriter,
    Unmirror,
)
from asyncckpt.writer.mirroring import Mirroring
from asyncckpt.writer.pending import PendingSave, PendingSaves
from asyncckpt.writer.pipeline import Pipeline
from asyncckpt.writer.pruning import Pruner
from asyncckpt.writer.urgency import PutBackError, Urgency, raise_priority

__all__ = ["serve"]

_ALIVE_INTERVAL_S = 5.0
_logger = get_logger("asyncckpt.writer")


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
        self._hurried = anyio.Event()
        self._pipeline = Pipeline(
            store,
            configure.compression,  # type: ignore[arg-type]
            configure.threads,
            incremental=configure.incremental,
            check_finite=configure.check_finite,
            is_own_process=configure.trainer_pid != os.getpid(),
            urgency=self._urgency,
        )
        self._arenas = Arenas()
        self._pending = PendingSaves()
        self._send_lock = anyio.Lock()
        self._prune_lock = anyio.Lock()
        self._logs = LogBuffer()
        if configure.trainer_pid != os.getpid():  # as a thread it logs where the trainer does
            self._logs.install(configure.log_level)

    async def run(self, received: list[ToWriter]) -> None:
        try:
            await self._run(received)
        finally:
            self._pending.close()
            self._arenas.close()

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
        self._pending.end()

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
        while select.select([self._sock], [], [], 0)[0] and not self._pending.has_ended:
            await anyio.lowlevel.checkpoint()
        self._pending.end()

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
            await anyio.sleep(PROGRESS_INTERVAL_S)
            current = self._pending.current
            if current is not None and self._urgency.done_bytes != told:
                told = self._urgency.done_bytes
                await self._send(Progress(current.save.save_id, told))

    async def _send_logs(self) -> None:
        for record in self._logs.take():
            await self._send(record)

    async def _dispatch(self, message: ToWriter) -> None:
        match message:
            case Attach():
                self._arenas.attach(message, self._frames.descriptors)
            case Detach():
                self._arenas.detach(message)
            case Save():
                self._pending.add(message)
                self._put_back_if_late()
            case More():
                self._pending.add_part(message)
            case Drop(save_id=save_id):
                await self._send(Dropped(save_id, withdrawn=self._pending.drop(save_id)))
            case LogLevel(level=level):
                if self._trainer_pid != os.getpid():
                    self._logs.install(level)
            case Unmirror(step=step, nonce=nonce):
                self._mirroring.withdraw(step, nonce)
            case Hurry():
                self._take_hurry(message)
            case Close():
                self._pending.end()

    def _take_hurry(self, hurry: Hurry) -> None:
        self._pending.reorder(hurry.order)
        self._urgency.compress = hurry.compress
        self._pipeline.hurry()
        self._mirroring.stop()  # neither the saves nor whoever waits for the end have time for it
        if self._trainer_pid != os.getpid():
            raise_priority()
        self._hurried.set()
        self._put_back_if_late()

    def _put_back_if_late(self) -> None:
        """Interrupt what is being written if a `Hurry` wants another save before it."""
        if self._pending.is_late():
            self._urgency.put_back()

    async def _write_all(self) -> None:
        await self._discard_partials()
        while (pending := await self._pending.begin_next()) is not None:
            with self._mirroring.held():
                is_durable = await self._write_one(pending)
            # Nothing that is not a save may stand in the way of one when there is little time.
            if is_durable and not (self._hurried.is_set() and self._pending):
                await self._prune()
            await self._send_logs()

    async def _discard_partials(self) -> None:
        # A writer before this one may have been killed in a save that nobody repeats (streamed, or stalled).
        try:
            await anyio.to_thread.run_sync(discard_partials, self._store)
        except CheckpointError as error:
            _logger.warning("an unfinished step stays behind: %s", error)

    async def _write_one(self, pending: PendingSave) -> bool:
        save = pending.save
        self._urgency.begin_save()
        attempts = Attempts(
            pending, self._pipeline, self._arenas, self._send, self._send_logs, lambda: not self._hurried.is_set()
        )
        try:
            stats = await attempts.write()
        except PutBackError:
            self._pending.put_back()
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
            self._pending.end_current()

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
