"""Copies committed steps to the mirror in the background, whatever happens to the mirror.

Nothing here may fail or delay a save: every error ends in a message to the trainer and in another try.
What is missing is found by comparing both roots, so a writer that starts anew, or a mirror that was away,
is caught up with; see ``docs/decisions/032-mirror.md``.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from asyncckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptError, error_to_fields
from asyncckpt.logs import get_logger
from asyncckpt.model import CheckpointInfo
from asyncckpt.policies.mirror import Mirror
from asyncckpt.stores.contract import Store
from asyncckpt.writer.messages import FromWriter, MirrorEvent, MirrorState
from asyncckpt.writer.mirror_worker import MirrorPlan, MirrorWorker
from asyncckpt.writer.pace import CopyStoppedError, Pace

__all__ = ["Mirroring"]

_MAX_RETRY_S = 60.0
_STOP_S = 5.0
"""How long a copy that was told to stop may take to remove what it wrote; a disk that hangs is left alone then."""

_logger = get_logger("asyncckpt.writer")
_T = TypeVar("_T")


class Mirroring:
    """Keeps one mirror up to date: `run` in a task, and the other methods in the same event loop.

    State: all of it is touched by the event loop only, except ``_worker``, which one thread at a time uses
    on behalf of `run`, and ``_pace``, which is thread-safe.

    Args:
        source: the first root.
        options: the mirror; None has none, and there is nothing to do.
        send: tells the trainer.
        on_released: a step is not `in_use` any more; retention may have left it for that.
        incremental: see `MirrorWorker`.
    """

    def __init__(
        self,
        source: Store,
        options: Mirror | None,
        send: Callable[[FromWriter], Awaitable[None]],
        on_released: Callable[[], Awaitable[None]],
        *,
        incremental: bool = True,
    ) -> None:
        self._options = options
        self._send = send
        self._on_released = on_released
        self._pace = Pace()
        self._worker = None if options is None else MirrorWorker(source, options, self._pace, incremental=incremental)
        self._limiter = anyio.CapacityLimiter(1)
        self._wake = anyio.Event()
        self._has_ended = anyio.Event()
        self._is_ending = False
        self._expected: dict[int, str] = {}  # committed since we started, and not on the mirror yet
        self._last_nonce = ""
        self._rewritten: set[int] = set()  # numbers committed since the roots were compared
        self._withdrawn: dict[int, str] = {}
        self._refused: dict[str, dict[str, Any]] = {}  # errors of damaged steps, by nonce
        self._num_failures = 0
        self._state = MirrorState()
        self._last_report: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"<Mirroring {self._options}: {self._state}>"

    # -- what happens in the writer ---------------------------------------------------------------

    @property
    def in_use(self) -> Set[int]:
        """Steps being copied, which retention in the first root must leave alone.

        Else a mirror slower than training would never complete a copy.
        """
        return frozenset() if self._state.copying is None else frozenset({self._state.copying})

    def held(self) -> AbstractContextManager[None]:
        """A save is being written: it goes first."""
        return self._pace.held()

    def note_committed(self, step: int, nonce: str) -> None:
        """*step* was committed in the first root."""
        if self._worker is None:
            return
        self._rewritten.add(step)
        self._expected[step] = self._last_nonce = nonce
        if not self._num_failures:  # a mirror in trouble is tried again at its own pace
            self._wake.set()

    def withdraw(self, step: int, nonce: str) -> None:
        """*step* was deleted in the first root on purpose, and is to be deleted here as well."""
        self._withdrawn[step] = nonce
        self._expected.pop(step, None)
        self._wake.set()

    def stop(self) -> None:
        """End whatever is being copied, and copy nothing more: there is no time left."""
        self._pace.stop()

    async def finish(self) -> None:
        """The run ends: give the newest step some time to arrive. Returns in bounded time."""
        if self._options is None:
            return
        self._is_ending = True
        self._wake.set()
        with anyio.move_on_after(0 if self._pace.is_stopped else self._options.close_timeout_s):
            await self._has_ended.wait()
        if not self._has_ended.is_set():
            self.stop()
            with anyio.move_on_after(_STOP_S):
                await self._has_ended.wait()
        if missing := self._missing():
            _logger.warning(
                "the run ends before steps %s are on the mirror %s; the next run copies what is missing",
                missing,
                self._options.root,
            )

    # -- the task ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Copy what is missing, again and again, until `finish`."""
        if self._worker is None:
            return
        try:
            is_last = False
            while not is_last:
                self._wake = anyio.Event()
                is_last = self._is_ending
                await self._catch_up(self._worker)
                if not is_last:
                    with anyio.move_on_after(self._retry_s()):
                        await self._wake.wait()
        finally:
            self._worker.close()
            self._has_ended.set()

    def _retry_s(self) -> float:
        return min(_MAX_RETRY_S, 2.0 ** (self._num_failures - 1)) if self._num_failures else math.inf

    async def _catch_up(self, worker: MirrorWorker) -> None:
        try:
            while (info := await self._next(worker)) is not None:
                await self._copy(worker, info)
                await self._tell(copying=None)
                await self._on_released()
        except CopyStoppedError:
            await self._tell(copying=None)  # `finish` says what is missing
        except Exception as error:  # a bug here is no reason to lose a save
            worker.close()
            self._num_failures += 1
            await self._report_failure(error)
        else:
            self._num_failures = 0

    async def _next(self, worker: MirrorWorker) -> CheckpointInfo | None:
        """The step to copy now; tells the trainer how things stand."""
        if self._pace.is_stopped:
            raise CopyStoppedError
        await self._delete_withdrawn(worker)
        expected, rewritten, self._rewritten = dict(self._expected), self._rewritten, set()
        plan = await self._in_thread(worker.plan, rewritten, set(self._refused))
        missing = {info.step: info.nonce for info in plan.missing}
        await self._note_skipped(expected, missing)
        self._refused = {nonce: error for nonce, error in self._refused.items() if nonce in plan.present}
        error = next(iter(self._refused.values()), None)
        await self._tell(missing=list(missing), newest=plan.newest, copying=None, error=error)
        wanted = self._worth_waiting_for(plan) if self._is_ending else plan.missing
        return wanted[0] if wanted else None

    def _worth_waiting_for(self, plan: MirrorPlan) -> list[CheckpointInfo]:
        """At the end of the run: what it saved last, and what is newer than anything on the mirror."""
        return [
            info
            for info in plan.missing
            if info.nonce == self._last_nonce or plan.newest is None or info.step > plan.newest
        ]

    async def _delete_withdrawn(self, worker: MirrorWorker) -> None:
        for step, nonce in list(self._withdrawn.items()):
            if await self._in_thread(worker.delete, step, nonce):
                await self._send(MirrorEvent("pruned", step, {"reason": "it was deleted in the first root"}))
            if self._withdrawn[step] == nonce:
                del self._withdrawn[step]

    async def _note_skipped(self, expected: Mapping[int, str], missing: Mapping[int, str]) -> None:
        for step, nonce in expected.items():
            if missing.get(step) == nonce or self._expected.get(step) != nonce:
                continue
            del self._expected[step]
            if nonce not in self._refused:
                reason = "newer steps were committed before its turn came"
                _logger.warning("step %d is not mirrored: %s", step, reason)
                await self._send(MirrorEvent("skipped", step, {"reason": reason}))

    async def _copy(self, worker: MirrorWorker, info: CheckpointInfo) -> None:
        await self._tell(copying=info.step)
        started = anyio.current_time()
        try:
            stats = await self._in_thread(worker.copy, info)
        except CheckpointNotFoundError:
            return  # deleted meanwhile; `_next` looks again
        except CorruptError as error:
            self._refused[info.nonce] = error_to_fields(error)
            await self._report_failure(error)
            return
        if self._expected.get(info.step) == info.nonce:
            del self._expected[info.step]
        self._last_report = ()
        fields = {
            "elapsed_s": anyio.current_time() - started,
            "copied_bytes": stats.copied_bytes,
            "linked_bytes": stats.linked_bytes,
        }
        await self._send(MirrorEvent("copied", info.step, fields))
        await self._prune(worker)

    async def _prune(self, worker: MirrorWorker) -> None:
        removed, failure = await self._in_thread(worker.prune)
        if failure is not None:
            _logger.warning("retention on the mirror failed: %s", failure)
        for decision in removed:
            await self._send(MirrorEvent("pruned", decision.step, {"reason": decision.reason}))

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        # Whoever ends the run must not wait for a disk that hangs.
        return await anyio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._limiter)

    # -- what the trainer hears ----------------------------------------------------------------------

    async def _report_failure(self, error: Exception) -> None:
        fields, step = error_to_fields(error), self._state.copying
        await self._tell(missing=self._missing(), copying=None, error=fields)
        report = (step, fields["code"], fields["fields"].get("errno"))
        if report == self._last_report:
            return  # once is loud enough; `health` goes on to say it
        self._last_report = report
        if isinstance(error, CheckpointError):
            _logger.warning("the mirror: %s", error)
        else:
            _logger.error("the mirror: %s", error, exc_info=error)
        why = {"error": fields["code"], "message": fields["message"], "errno": fields["fields"].get("errno")}
        await self._send(MirrorEvent("failed", step, why))

    def _missing(self) -> list[int]:
        """What is known to be missing, newest first, also while the mirror cannot be looked at."""
        return sorted({*self._state.missing, *self._expected}, reverse=True)

    async def _tell(self, **changes: Any) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        if state != self._state:
            self._state = state
            await self._send(state)
