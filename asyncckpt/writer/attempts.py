"""One save, written as often as it takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

from asyncckpt.errors import WriterDiedError
from asyncckpt.logs import get_logger
from asyncckpt.writer.arenas import Arenas
from asyncckpt.writer.messages import FromWriter, Progress, Released, WriteStats
from asyncckpt.writer.pending import PendingSave
from asyncckpt.writer.pipeline import Pipeline, Segment
from asyncckpt.writer.retry import retry_delay
from asyncckpt.writer.urgency import PutBackError

__all__ = ["PROGRESS_INTERVAL_S", "Attempts"]

PROGRESS_INTERVAL_S = 0.25
"""How often the trainer hears of progress, at most."""

_logger = get_logger("asyncckpt.writer")


class Attempts:
    """The attempts at one save.

    Args:
        pending: the save.
        pipeline: writes it.
        arenas: where its tensors lie.
        send: tells the trainer.
        send_logs: before a pause, tells it what was logged.
        tells_progress: whether it is told what each job adds; asked again each time.
    """

    def __init__(
        self,
        pending: PendingSave,
        pipeline: Pipeline,
        arenas: Arenas,
        send: Callable[[FromWriter], Awaitable[None]],
        send_logs: Callable[[], Awaitable[None]],
        tells_progress: Callable[[], bool],
    ) -> None:
        self._pending = pending
        self._pipeline = pipeline
        self._arenas = arenas
        self._send = send
        self._send_logs = send_logs
        self._tells_progress = tells_progress
        self._reported_s = time.monotonic()

    async def write(self) -> WriteStats:
        """Write the save, again if what went wrong may pass.

        Raises:
            PutBackError: another save goes first.
            Exception: what the first attempt met.
        """
        save = self._pending.save
        first: BaseException | None = None
        num_failures = 0
        while True:
            try:
                return await self._attempt()
            except Exception as error:
                cause = _first_cause(error)
            if isinstance(cause, PutBackError):
                raise cause
            # A streamed snapshot is gone with the segments that were reused.
            delay_s = None if self._pending.is_streamed else retry_delay(cause, num_failures)
            first = first or cause
            if delay_s is None:
                # What stood in the way first says more than what a repetition ran into.
                raise first
            _logger.warning("step %d: %s; trying again in %s s", save.step, cause, delay_s)
            await self._send_logs()
            await anyio.sleep(delay_s)
            num_failures += 1

    async def _attempt(self) -> WriteStats:
        number = self._pending.num_attempts
        self._pending.num_attempts += 1
        return await self._pipeline.write(self._pending.save, self._segments(), self._report_progress, number)

    async def _segments(self) -> AsyncIterator[Segment]:
        save = self._pending.save
        if not self._pending.is_streamed:
            # All of it is here, and stays here for further attempts.
            yield Segment(save.tensors, self._arenas.buffer(save.arena_id), _nothing_to_release)
            return
        last = False
        async for part in self._pending.receive:
            last = part.last

            async def release(last: bool = last) -> None:
                if not last:
                    await self._send(Released(save.save_id))

            yield Segment(part.tensors, self._arenas.buffer(part.arena_id), release)
        if not last:
            raise WriterDiedError(f"the trainer ended while step {save.step} was still being staged", step=save.step)

    async def _report_progress(self, done_bytes: int) -> None:
        now = time.monotonic()
        if now - self._reported_s >= PROGRESS_INTERVAL_S and self._tells_progress():
            self._reported_s = now
            await self._send(Progress(self._pending.save.save_id, done_bytes))


async def _nothing_to_release() -> None:
    """The trainer learns from the save's end that its arena is free."""


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
