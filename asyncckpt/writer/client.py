"""The trainer's side of the conversation: supervises the writer and routes its answers.

A writer that dies, is stopped or hangs is replaced, and the new one is sent every save that had no
answer; their snapshots are still in the arenas, which belong to the trainer.

Threads: any thread may call the public methods; one daemon thread, the reader, hears the writer, watches
it and replaces it. ``_sending`` is held for whole frames and orders them; it may be held for as long as a
stopped writer does not read, so the reader takes it only once that writer's connection is shut, and
`WriterClient.close` gives up waiting for it in time. ``_arenas`` belongs to whoever holds it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from asyncckpt.errors import (
    CheckpointError,
    ClosedError,
    StorageError,
    WriterDiedError,
    WriterError,
    error_from_fields,
)
from asyncckpt.future import serve_futures
from asyncckpt.logs import get_logger
from asyncckpt.memory import Arena
from asyncckpt.writer.link import Link
from asyncckpt.writer.logs import hand_on, wanted_level
from asyncckpt.writer.messages import (
    Alive,
    Attach,
    Close,
    Configure,
    Detach,
    Drop,
    Durable,
    FromWriter,
    Hurry,
    LogLevel,
    LogRecord,
    MirrorEvent,
    MirrorState,
    More,
    Pruned,
    Ready,
    Refused,
    Save,
    ToWriter,
    Unmirror,
)
from asyncckpt.writer.outstanding import Outstanding, OutstandingSaves, SaveListener
from asyncckpt.writer.watch import CHECK_INTERVAL_S, Symptom, WriterWatch

__all__ = ["GaveUp", "Replaced", "SaveListener", "WriterClient", "WriterNews"]

_logger = get_logger("asyncckpt.writer")
_NO_PROGRESS = (Alive, LogRecord, MirrorEvent, MirrorState)


@dataclass(frozen=True, slots=True)
class Replaced:
    """A writer that did not work any more was replaced. ``reason`` says how it ended; ``pid`` is the new one's."""

    reason: str
    pid: int


@dataclass(frozen=True, slots=True)
class GaveUp:
    """There will be no writer any more; all saves fail with ``error``."""

    error: CheckpointError


WriterNews = Pruned | MirrorEvent | MirrorState | Replaced | GaveUp


class WriterClient:
    """Keeps one writer running and talks to it.

    Args:
        configure: sent to every writer that is started.
        start_link: starts a writer.
        restarts: how often in a row a dead writer is replaced.
        stall_timeout_s: see `options.Writer`.
        on_news: hears what is not about one save; called on the reader thread, must not raise.

    Raises:
        WriterError: no writer could be started.
    """

    def __init__(
        self,
        configure: Configure,
        start_link: Callable[[], Link],
        restarts: int,
        stall_timeout_s: float | None,
        on_news: Callable[[WriterNews], None],
    ) -> None:
        self._configure = configure
        self._start_link = start_link
        self._max_restarts = restarts
        self._stall_timeout_s = stall_timeout_s
        self._on_news = on_news
        self._sending = threading.Lock()
        self._arenas: dict[int, Arena] = {}
        self._outstanding = OutstandingSaves()
        self._restarts = 0
        self._is_closing = False
        self._hurry: Hurry | None = None
        self._close_was_sent = False
        self._failure: CheckpointError | None = None
        self._symptom: Symptom | None = None
        self._watch = WriterWatch(stall_timeout_s)
        try:
            self._link = start_link()
        except OSError as error:
            raise WriterError(f"the writer could not be started: {error}") from error
        self._send(configure)
        _clients.add(self)
        # To wait for, rather than to join: an interrupted `Thread.join` takes the thread for dead (CPython bpo-45274).
        self._has_ended = threading.Event()
        threading.Thread(target=self._read, name="asyncckpt-replies", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process that runs the writer now."""
        return self._link.pid

    @property
    def num_restarts(self) -> int:
        """How often the writer was replaced since it last committed a step."""
        return self._restarts

    def attach(self, arena: Arena) -> None:
        """Make *arena* known to this writer and to those that replace it."""
        with self._sending:
            self._arenas[arena.arena_id] = arena
            self._send_attach(arena)

    def detach(self, arena: Arena) -> None:
        """Forget *arena*; no save may refer to it any more."""
        with self._sending:
            self._arenas.pop(arena.arena_id, None)
            self._send(Detach(arena.arena_id))

    def submit(self, save: Save, listener: SaveListener) -> None:
        """Hand over a save. On return it is durable-to-be: it no longer needs the trainer.

        Raises:
            CheckpointError: the writer is gone for good.
        """
        with self._sending:
            self._raise_failure()
            self._tell_log_level()
            outstanding = self._outstanding.add(save.save_id, listener)
            self._send_part(outstanding, save)
        self._wait_sent(outstanding)

    def submit_more(self, part: More) -> None:
        """Hand over a further segment of a save; silently ignored once the save has failed."""
        with self._sending:
            outstanding = self._outstanding.get(part.save_id)
            if outstanding is None:
                return
            self._send_part(outstanding, part)
        self._wait_sent(outstanding)

    def drop(self, save_id: int) -> bool:
        """Withdraw a save the writer has not begun; whether that succeeded."""
        outstanding = self._outstanding.get(save_id)
        if outstanding is None:
            return False
        outstanding.drop_answer = None
        with self._sending:
            self._send(Drop(save_id))
        self._outstanding.wait_for(lambda: outstanding.drop_answer is not None or outstanding.has_ended)
        return bool(outstanding.drop_answer)

    def abandon(self, save_id: int) -> None:
        """Give up a streamed save whose snapshot could not be completed; nothing of it is committed."""
        if self._outstanding.pop(save_id) is not None:
            with self._sending:
                self._send(Drop(save_id))

    def unmirror(self, step: int, nonce: str) -> None:
        """Have a step deleted on the mirror, too; a writer that dies before it does so takes this with it."""
        with self._sending:
            self._send(Unmirror(step, nonce))

    def hurry(self, message: Hurry) -> None:
        """Tell this writer, and those that replace it, that little time is left."""
        with self._sending:
            self._hurry = message
            self._send(message)

    def close(self, timeout: float) -> bool:
        """Let the writer finish and end; whether it did within *timeout* seconds. Repeatable."""
        deadline = time.monotonic() + timeout
        if not self._sending.acquire(timeout=timeout):
            return False
        try:
            self._is_closing = True  # first: the writer may be gone as soon as it was told
            if not self._close_was_sent:  # often asked, told once: one that does not read must not block us
                self._send(Close())
                self._close_was_sent = True
        finally:
            self._sending.release()
        return self._has_ended.wait(max(0.0, deadline - time.monotonic()))

    def _tell_log_level(self) -> None:
        level = wanted_level()
        if level != self._configure.log_level:
            self._configure = msgspec.structs.replace(self._configure, log_level=level)
            self._send(LogLevel(level))

    def _send_part(self, outstanding: Outstanding, part: Save | More) -> None:
        outstanding.parts.append(part)
        self._outstanding.note_sent(outstanding, self._send(part))

    def _wait_sent(self, outstanding: Outstanding) -> None:
        # A writer that died under us is about to be replaced, and the next one is sent the save.
        self._outstanding.wait_for(lambda: outstanding.was_sent or outstanding.has_ended)

    def _send(self, message: ToWriter) -> bool:
        try:
            self._link.channel.send(message)
        except OSError:
            return False
        return True

    def _send_attach(self, arena: Arena) -> None:
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
        serve_futures()
        try:
            while True:
                self._read_from_one()
                if not self._replace_writer():
                    return
        finally:
            self._has_ended.set()

    def _read_from_one(self) -> None:
        for message in self._link.channel.receive(CHECK_INTERVAL_S):
            if message is None:
                self._check_writer()
            else:
                self._watch.heard(is_progress=not isinstance(message, _NO_PROGRESS))
                self._handle(message)

    def _check_writer(self) -> None:
        """Kill a writer that does not work; the end of its connection then has it replaced."""
        if not self._link.can_kill or self._symptom is not None:
            return
        self._symptom = self._watch.check(is_stopped=self._link.is_stopped(), is_busy=len(self._outstanding) > 0)
        if self._symptom is not None:
            self._link.kill()

    def _handle(self, message: FromWriter) -> None:
        match message:
            case Refused(error=error):
                self._fail_for_good(error_from_fields(error))
            case Pruned() | MirrorEvent() | MirrorState():
                self._on_news(message)
            case LogRecord():
                hand_on(message, self._link.pid)
            case Ready() | Alive():
                pass
            case _:
                if isinstance(message, Durable):
                    self._restarts = 0
                self._outstanding.answer(message)

    def _replace_writer(self) -> bool:
        """The writer's connection ended: start another if there is anything left to do."""
        if self._symptom is None and not self._link.wait(timeout=5):  # to be able to say how it ended
            self._link.kill()  # two must not write
        how = self._describe_end()
        self._link.channel.shutdown()  # whoever is sending fails now, and lets go of the lock
        if (self._is_closing and not self._outstanding) or self._failure is not None:
            return self._take_leave()
        if self._symptom == "stalled":
            message = f"the writer {how}; check the storage, then save again"
            self._outstanding.fail_oldest(StorageError(message, errno=errno.ETIMEDOUT))
        self._outstanding.fail_unrepeatable(
            WriterDiedError(
                f"the writer {how} while it streamed a state larger than the staging memory; "
                "raise Staging.memory_limit or save again"
            )
        )
        link = self._start_another(how)
        if link is None:
            return self._take_leave()
        self._take_over(link)
        self._on_news(Replaced(f"the writer {how}", link.pid))
        return True

    def _take_leave(self) -> bool:
        with self._sending:
            self._link.channel.close()
        return False

    def _start_another(self, how: str) -> Link | None:
        while self._restarts < self._max_restarts:
            # The first replacement comes at once; what dies again and again gets time to recover.
            time.sleep(min(2.0, 0.1 * 2**self._restarts) if self._restarts else 0.0)
            self._restarts += 1
            _logger.warning("the writer %s; starting another", how)
            try:
                return self._start_link()
            # No processes or descriptors left; RuntimeError: the interpreter is ending, from Python 3.12 on.
            except (OSError, RuntimeError) as error:
                how = f"could not be started: {error}"
        message = f"the writer {how} and was already restarted {self._restarts} times"
        self._fail_for_good(WriterDiedError(f"{message}; its messages are on the trainer's standard error"))
        return None

    def _describe_end(self) -> str:
        match self._symptom:
            case "stopped":
                return "was stopped by a signal and did not go on"
            case "silent":
                return "gave no sign of life"
            case "stalled":
                return f"got nothing written for {self._stall_timeout_s:g} s"
        return self._link.describe_end()

    def _take_over(self, link: Link) -> None:
        with self._sending:
            self._link.channel.close()
            self._link = link
            self._symptom = None
            self._watch = WriterWatch(self._stall_timeout_s)
            self._send(self._configure)
            for arena in self._arenas.values():
                self._send_attach(arena)
            for outstanding in self._outstanding:
                self._outstanding.note_sent(outstanding, all(map(self._send, outstanding.parts)))
            if self._hurry is not None:
                self._send(self._hurry)
            if self._is_closing:
                self._send(Close())

    def _fail_for_good(self, error: CheckpointError) -> None:
        with self._sending:
            self._failure = error
        self._outstanding.fail_all(error)
        self._on_news(GaveUp(error))

    def __repr__(self) -> str:
        state = "closing" if self._is_closing else "failed" if self._failure else "serving"
        return f"<WriterClient {state} pid={self.pid} outstanding={len(self._outstanding)}>"


# A forked DataLoader worker that kept the socket open would hide our death from the writer.
_clients: weakref.WeakSet[WriterClient] = weakref.WeakSet()


def _close_sockets_in_child() -> None:
    for client in _clients:
        client._link.channel.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_sockets_in_child)
