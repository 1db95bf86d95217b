"""The trainer's side of the conversation: supervises the writer and routes its answers.

A writer that dies is started again and is sent every save it had not answered; their snapshots are
still in the arenas, which belong to the trainer.

Threads: any thread may call the public methods; one daemon thread, the reader, receives answers and
restarts the writer. ``_lock`` guards all state below; listeners are called without it.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from asyncckpt.errors import CheckpointError, ClosedError, WriterDiedError, error_from_fields
from asyncckpt.memory import Arena
from asyncckpt.writer.link import Link
from asyncckpt.writer.messages import (
    Attach,
    Close,
    Configure,
    Detach,
    Drop,
    Dropped,
    Durable,
    Failed,
    FromWriter,
    LogRecord,
    More,
    Progress,
    Pruned,
    Ready,
    Refused,
    Released,
    Save,
    ToWriter,
    WriteStats,
)

__all__ = ["SaveListener", "WriterClient"]

_logger = logging.getLogger("asyncckpt.writer")


class SaveListener(Protocol):
    """Hears about one save. Called on the reader thread; must not block."""

    def on_progress(self, done_bytes: int) -> None: ...

    def on_released(self) -> None: ...

    def on_durable(self, stats: WriteStats) -> None: ...

    def on_failed(self, error: CheckpointError) -> None: ...

    def on_dropped(self) -> None: ...


@dataclass(slots=True)
class _Outstanding:
    """A save without an answer, and what must be sent again if the writer dies."""

    listener: SaveListener
    parts: list[Save | More] = field(default_factory=list)
    was_sent: bool = False
    drop_answer: bool | None = None

    @property
    def is_replayable(self) -> bool:
        return self.parts[-1].last and len(self.parts) == 1


class WriterClient:
    """Keeps one writer running and talks to it.

    Args:
        configure: sent to every writer that is started.
        start_link: starts a writer.
        restarts: how often in a row a dead writer is replaced.
        on_pruned: hears which steps retention removed.
    """

    def __init__(
        self,
        configure: Configure,
        start_link: Callable[[], Link],
        restarts: int,
        on_pruned: Callable[[Pruned], None],
    ) -> None:
        self._configure = configure
        self._start_link = start_link
        self._max_restarts = restarts
        self._on_pruned = on_pruned
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._arenas: dict[int, Arena] = {}
        self._outstanding: dict[int, _Outstanding] = {}
        self._restarts = 0
        self._is_ready = False
        self._is_closing = False
        self._failure: CheckpointError | None = None
        self._owner_pid = os.getpid()
        self._link = start_link()
        self._channel_send(configure)
        _clients.add(self)
        self._reader = threading.Thread(target=self._read, name="asyncckpt-replies", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process that runs the writer now."""
        return self._link.pid

    @property
    def num_restarts(self) -> int:
        """How often the writer was replaced since it last committed a step."""
        return self._restarts

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the writer answered for the first time."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready or self._failure is not None, timeout)
            self._raise_failure()
            return self._is_ready

    def attach(self, arena: Arena) -> None:
        """Make *arena* known to this writer and to those that replace it."""
        with self._lock:
            self._arenas[arena.arena_id] = arena
            self._channel_send_attach(arena)

    def detach(self, arena: Arena) -> None:
        """Forget *arena*; no save may refer to it any more."""
        with self._lock:
            self._arenas.pop(arena.arena_id, None)
            self._channel_send(Detach(arena.arena_id))

    def submit(self, save: Save, listener: SaveListener) -> None:
        """Hand over a save. On return it is durable-to-be: it no longer needs the trainer.

        Raises:
            CheckpointError: the writer is gone for good.
        """
        with self._changed:
            self._raise_failure()
            outstanding = self._outstanding[save.save_id] = _Outstanding(listener)
            self._send_part(outstanding, save)

    def submit_more(self, part: More) -> None:
        """Hand over a further segment of a save; silently ignored once the save has failed."""
        with self._changed:
            outstanding = self._outstanding.get(part.save_id)
            if outstanding is not None:
                self._send_part(outstanding, part)

    def drop(self, save_id: int) -> bool:
        """Withdraw a save the writer has not begun; whether that succeeded."""
        with self._changed:
            outstanding = self._outstanding.get(save_id)
            if outstanding is None:
                return False
            outstanding.drop_answer = None
            self._channel_send(Drop(save_id))
            self._changed.wait_for(lambda: outstanding.drop_answer is not None or save_id not in self._outstanding)
            return bool(outstanding.drop_answer)

    def abandon(self, save_id: int) -> None:
        """Give up a streamed save whose snapshot could not be completed; nothing of it is committed."""
        with self._changed:
            if self._outstanding.pop(save_id, None) is not None:
                self._channel_send(Drop(save_id))

    def close(self, timeout: float | None) -> bool:
        """Let the writer finish and end; whether it did within *timeout*. Idempotent."""
        with self._lock:
            if os.getpid() != self._owner_pid:
                return True
            self._is_closing = True
            self._channel_send(Close())
        self._reader.join(timeout)
        return not self._reader.is_alive()

    def _send_part(self, outstanding: _Outstanding, part: Save | More) -> None:
        outstanding.parts.append(part)
        outstanding.was_sent = self._channel_send(part)
        # The writer died under us: the reader is about to replace it and sends the save itself.
        self._changed.wait_for(lambda: outstanding.was_sent or part.save_id not in self._outstanding)

    def _channel_send(self, message: ToWriter) -> bool:
        try:
            self._link.channel.send(message)
        except OSError:
            return False
        return True

    def _channel_send_attach(self, arena: Arena) -> None:
        local = self._link.local_arenas
        message = Attach(arena.arena_id, arena.num_bytes, local)
        try:
            self._link.channel.send(message, None if local else arena.fd)
        except OSError:
            return

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closing:
            raise ClosedError("the checkpointer is closed")

    # -- reader thread -------------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            for message in self._link.channel.receive():
                self._handle(message)
            if not self._replace_writer():
                return

    def _handle(self, message: FromWriter) -> None:
        match message:
            case Ready():
                with self._changed:
                    self._is_ready = True
                    self._changed.notify_all()
            case Refused(error=error):
                self._fail_all(error_from_fields(error))
            case Progress(save_id=save_id, done_bytes=done_bytes):
                if (outstanding := self._outstanding.get(save_id)) is not None:
                    outstanding.listener.on_progress(done_bytes)
            case Released(save_id=save_id):
                if (outstanding := self._outstanding.get(save_id)) is not None:
                    outstanding.listener.on_released()
            case Durable(save_id=save_id, stats=stats):
                self._restarts = 0
                if (outstanding := self._pop(save_id)) is not None:
                    outstanding.listener.on_durable(stats)
            case Failed(save_id=save_id, error=error):
                if (outstanding := self._pop(save_id)) is not None:
                    outstanding.listener.on_failed(error_from_fields(error))
            case Dropped(save_id=save_id, withdrawn=withdrawn):
                self._handle_dropped(save_id, withdrawn)
            case Pruned():
                self._on_pruned(message)
            case LogRecord(level=level, message=text):
                _logger.log(level, "%s", text)

    def _handle_dropped(self, save_id: int, withdrawn: bool) -> None:
        with self._changed:
            outstanding = self._outstanding.get(save_id)
            if outstanding is None:
                return
            outstanding.drop_answer = withdrawn
            if withdrawn:
                del self._outstanding[save_id]
            self._changed.notify_all()
        if withdrawn:
            outstanding.listener.on_dropped()

    def _pop(self, save_id: int) -> _Outstanding | None:
        with self._changed:
            outstanding = self._outstanding.pop(save_id, None)
            self._changed.notify_all()
            return outstanding

    def _replace_writer(self) -> bool:
        """The writer's connection ended: start another if there is anything left to do."""
        self._link.wait(timeout=5)
        self._link.channel.close()
        if self._is_closing and not self._outstanding:
            return False
        if self._failure is not None:
            return False
        self._fail_unrepeatable()
        if self._restarts >= self._max_restarts:
            self._fail_all(
                WriterDiedError(
                    f"the writer {self._link.describe_end()} and was already restarted {self._restarts} times; "
                    "its messages are on the trainer's standard error"
                )
            )
            return False
        with self._changed:
            self._restarts += 1
            _logger.warning("the writer %s; starting it again", self._link.describe_end())
            self._link = self._start_link()
            self._channel_send(self._configure)
            for arena in self._arenas.values():
                self._channel_send_attach(arena)
            for outstanding in self._outstanding.values():
                for part in outstanding.parts:
                    outstanding.was_sent = self._channel_send(part)
            if self._is_closing:
                self._channel_send(Close())
            self._changed.notify_all()
        return True

    def _fail_unrepeatable(self) -> None:
        # A snapshot larger than the staging memory is gone with the segments that were reused.
        lost = [save_id for save_id, entry in self._outstanding.items() if not entry.is_replayable]
        for save_id in lost:
            if (outstanding := self._pop(save_id)) is not None:
                outstanding.listener.on_failed(
                    WriterDiedError(
                        f"the writer {self._link.describe_end()} while it streamed a state larger than the "
                        "staging memory; raise Staging.memory_limit or save again"
                    )
                )

    def _fail_all(self, error: CheckpointError) -> None:
        with self._changed:
            self._failure = error
            lost, self._outstanding = self._outstanding, {}
            self._changed.notify_all()
        for outstanding in lost.values():
            outstanding.listener.on_failed(error)

    def __repr__(self) -> str:
        state = "closing" if self._is_closing else "ready" if self._is_ready else "starting"
        return f"<WriterClient {state} pid={self.pid} outstanding={len(self._outstanding)}>"


# A forked DataLoader worker that kept the socket open would hide our death from the writer.
_clients: weakref.WeakSet[WriterClient] = weakref.WeakSet()


def _close_sockets_in_child() -> None:
    for client in _clients:
        client._link.channel.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_sockets_in_child)
