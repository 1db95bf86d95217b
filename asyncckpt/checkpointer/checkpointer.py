"""`Checkpointer`: saves in the background, restores in place."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from os import PathLike
from types import TracebackType
from typing import Any, Self

import anyio

from asyncckpt.checkpointer.books import Books
from asyncckpt.checkpointer.closing import close_at_exit, countdown, quiet_if
from asyncckpt.checkpointer.describing import (
    checked_kind,
    checked_metrics,
    checked_options,
    checked_step,
    checked_tags,
    versions,
)
from asyncckpt.checkpointer.ending import Ending
from asyncckpt.checkpointer.failures import UnseenFailures
from asyncckpt.checkpointer.interruption import StepWatch
from asyncckpt.checkpointer.last_save import LastSave
from asyncckpt.checkpointer.mirror import MirrorView, resolve_mirror
from asyncckpt.checkpointer.preempting import DEFAULT_PREEMPTION, Preempting
from asyncckpt.checkpointer.reading import Catalogue, Which
from asyncckpt.checkpointer.restoring import RestoreTarget, restore_in_place
from asyncckpt.checkpointer.saves import SaveCoordinator
from asyncckpt.checkpointer.starting import release_on_error, runs_as_process, start_writer
from asyncckpt.checkpointer.ticket import SaveFacts
from asyncckpt.errors import InvalidOptionError
from asyncckpt.events import EventCallback, EventDispatcher, event_callbacks
from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.paths import step_name
from asyncckpt.future import SaveFuture, SavePromise
from asyncckpt.model import CheckpointInfo, Health, Outcome, Statistics
from asyncckpt.options import Compression, Preemption, Staging, Writer
from asyncckpt.policies.keep import Keep
from asyncckpt.policies.mirror import Mirror
from asyncckpt.policies.when import When
from asyncckpt.repository.catalog import Catalog
from asyncckpt.repository.lock import RunLock
from asyncckpt.repository.root import clean_partials, prepare_root
from asyncckpt.stores.local import local_path
from asyncckpt.telemetry.log_lines import log_event

__all__ = ["Checkpointer"]


class Checkpointer(Catalogue):
    """Saves training state without stopping training, and restores it.

    One checkpointer writes to one root at a time; readers need none (see `asyncckpt.open`). It is a `Catalogue` of
    its root, too: `checkpoints`, `latest`, `best`, `load`, `verify` and `recover` are described there. Use it as
    a context manager, sync or async: leaving the block waits until everything is durable.

    Args:
        root: directory of the run; created when missing.
        state: what to save: objects with ``state_dict``/``load_state_dict``, tensors, arrays and plain
            values, nested. The mapping is kept and read at every save; `restore` updates it in place.
        when: when `step` saves; None means only `save` does.
        keep: which committed steps survive; the newest and tagged ones always do.
        compression: ``"fast"``, ``"small"``, ``"none"``, or a Zarr v3 codec list.
        staging: how snapshots are taken.
        writer: how they are written.
        mirror: a second root, best on another disk, to which committed steps are copied in the background
            and from which `restore` takes what is damaged or lost here. Its troubles are told by events, the log
            and `health`, and never fail a save.
        preemption: what tells the training to stop; None watches no signals.
        metadata: plain values recorded in every checkpoint.
        on_event: called with each `Event`: one function or several; see ``docs/telemetry.md``.

    Raises:
        InvalidOptionError: an option is out of range.
        ForeignRootError: *root* holds something that is not ours.
        RootLockedError: another run writes to *root*.
        StorageError: *root* cannot be created or written.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        state: Mapping[str, Any] | None = None,
        *,
        when: When | None = None,
        keep: Keep | None = None,
        compression: Compression = "fast",
        staging: Staging | None = None,
        writer: Writer | None = None,
        mirror: Mirror | str | PathLike[str] | None = None,
        preemption: Preemption | None = DEFAULT_PREEMPTION,
        metadata: Mapping[str, Any] | None = None,
        on_event: EventCallback | Sequence[EventCallback] | None = None,
    ) -> None:
        checked_options(
            state=(state, Mapping),
            when=(when, When),
            keep=(keep, Keep),
            staging=(staging, Staging),
            writer=(writer, Writer),
            preemption=(preemption, Preemption),
            metadata=(metadata, Mapping),
        )
        resolve_codecs(compression, DATA_TYPES["float32"])
        self._state = state
        keep, staging, writer = keep or Keep(), staging or Staging(), writer or Writer()
        self._metadata = dict(metadata or {})
        self._events = EventDispatcher(log_event, *event_callbacks(on_event))
        self._run = uuid.uuid4().hex
        self._failures = UnseenFailures(writer.on_error)
        self._mirror = MirrorView(resolve_mirror(mirror, local_path(root)), self._events)
        self._books = Books(when, self._saved_metrics, self._failures, self._mirror, self._events)
        super().__init__(prepare_root(root), keep.best)
        self._lock = RunLock.acquire(self._store, {"pid": os.getpid(), "run": self._run}, writer.lock_timeout_s)
        with release_on_error(self._lock):
            clean_partials(self._store)
            self._books.steps.update(Catalog(self._store).steps())
            as_process = runs_as_process(writer)
            client = start_writer(
                self._store.url,
                self._lock,
                writer,
                compression,
                keep,
                self._mirror.options,
                staging.check_finite,
                self._books.note_news,
                as_process=as_process,
            )
            self._saves = SaveCoordinator(
                client,
                staging,
                shared=as_process,
                on_staged=self._books.narrator.note_staged,
                on_end=self._note_end,
            )
        self._preempting = Preempting(preemption, self._saves, self._events)
        self._step_watch = StepWatch()
        self._last_save = LastSave(
            None if state is None else self._save_last,
            self._saves.make_room,
            self._books.steps,
            self._preempting,
            self._step_watch,
        )
        self._ending = Ending(
            self._saves,
            self._preempting,
            self._step_watch,
            self._lock,
            self._failures,
            self._events,
            outlives=as_process,
        )
        self._ending.at_exit = close_at_exit(self)
        self._events.emit(
            "checkpointer.opened",
            root=self._store.location(""),
            run=self._run,
            writer_pid=client.pid,
            num_committed=len(self._books.steps),
        )

    # -- saving --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Sequence[str] = (),
        kind: str = "regular",
    ) -> SaveFuture:
        """Snapshot the state now and write it in the background.

        Args:
            step: training step, not negative and not yet saved in this root.
            state: what to save instead of the checkpointer's own state.
            metrics: numbers recorded with the checkpoint; ``Keep.best`` ranks by one of them.
            tags: names under which the checkpoint is found and never pruned.
            kind: why it is saved, as ``ls`` shows it and ``Keep.kinds`` goes by: ``"regular"``; ``"manual"``,
                which is kept until it is deleted; ``"final"``, the result of a run, likewise;
                ``"validation"``, ``"best"`` or ``"emergency"``.

        Returns:
            A future that resolves when the checkpoint would survive a power cut. Storage and writer
            failures are on the future.

        Raises:
            CheckpointError: an *earlier* save failed and nobody looked at it (``Writer(on_error=)``);
                this one was not begun, the next call begins one.
            ClosedError: the checkpointer was closed.
            InvalidOptionError: *step* is negative, a metric is no number, a tag is no text or ``"latest"`` or
                ``"best"``, *kind* is none, or no state was given.
            BusyError: called from a callback, and every staging slot is taken.
            StepExistsError: *step* is committed already, or being saved.
            UnsupportedStateError: the state holds something that cannot be stored.
        """
        self._ending.require_open()
        self._failures.report()
        return self._save(step, state, metrics, tags, kind)

    def _save(
        self,
        step: int,
        state: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None,
        tags: Sequence[str],
        kind: str,
    ) -> SaveFuture:
        started = time.perf_counter()
        state = self._state if state is None else state
        if state is None:
            raise InvalidOptionError("there is nothing to save: give Checkpointer(state=...) or save(state=...)")
        facts = SaveFacts(
            save_id=self._saves.next_id(),
            step=self._books.require_new(step, self._store.location("")),
            kind=checked_kind(kind),
            nonce=uuid.uuid4().hex,
            run=self._run,
            created=datetime.now(UTC),
            path=self._store.location(step_name(step)),
            metrics=self._books.decider.validation_of(step) | checked_metrics(metrics or {}),
            tags=checked_tags(tags),
            versions=versions(),
            metadata=self._metadata,
            started=started,
        )
        with self._books.entry(facts) as promise:
            self._saves.save(facts, state, promise)
        return promise.future

    def step(self, step: int, *, metrics: Mapping[str, float] | None = None) -> SaveFuture | None:
        """Tell that training step *step* is complete; saves when the ``when=`` policy says so.

        When the training was told to stop (see `Preemption`), the first call after that saves whatever the
        policy says, as ``kind="emergency"``, and `preempted` is true from then on.

        Returns:
            The future of the save, or None when none was due.

        Raises:
            CheckpointError: an earlier save failed and nobody looked at it (``Writer(on_error=)``);
                also everything `save` raises.
        """
        self._ending.require_open()
        preempting = self._preempting
        preempting.last_step = step
        self._step_watch.note_step()
        if preempting.is_requested and not preempting.is_preempted and preempting.stops_at(step):
            return self._last_save.make(step, metrics)
        self._failures.report()
        if self._state is not None:
            self._saves.prepare(self._state)
        kind = self._books.decider.after_step(step)
        return None if kind is None else self.save(step, metrics=metrics, kind=kind)

    def validated(self, step: int, metrics: Mapping[str, float]) -> SaveFuture | None:
        """Report what validating the state after *step* found; saves when the policy has a `Validation` for it.

        Call it before `step` of the same step: whatever saves that step afterwards records *metrics* as
        well. A checkpoint is never changed, so if *step* has been saved before, its metrics stay as they
        are, and a warning says so.

        Args:
            step: the training step just validated; the state must still be that of this step.
            metrics: numbers by name, such as ``{"val_loss": 2.1}``.

        Returns:
            The future of the save, or None when none was due.

        Raises:
            CheckpointError: as in `step`.
            InvalidOptionError: *step* is negative or a metric is no number.
            StorageError: the checkpoints there are, which ``Validation.best`` compares with, cannot be read.
        """
        self._ending.require_open()
        self._failures.report()
        kind = self._books.decider.after_validation(checked_step(step), checked_metrics(metrics))
        if step in self._books.steps:
            warnings.warn(
                f"step {step} was saved before validated({step}, ...): its checkpoint has none of these metrics; "
                f"call validated() before step() and save()",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return None if kind is None else self.save(step, kind=kind)

    def preempt(self, grace: float | None = None) -> None:
        """Do what a signal of `Preemption` does: flush what is staged, save at the next `step`, turn `preempted` true.

        For hooks of schedulers, and where signals cannot be watched. From any thread, and from signal handlers.

        Args:
            grace: seconds until the process is killed; None takes that of `Preemption`.
        """
        self._ending.require_open()
        self._preempting.request("preempt()", grace)

    @property
    def preempted(self) -> bool:
        """Whether the training should end now: it was told to stop, and the last `step` saved what could be saved."""
        return self._preempting.is_preempted

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save begun so far has ended.

        Raises:
            TimeoutError: some, which it names, are still being written; they go on.
            CheckpointError: one of them, or an earlier one nobody looked at, failed.
        """
        left_s = countdown(timeout)
        try:
            for promise in self._saves.pending:
                rest_s = left_s()
                promise.wait_done(None if rest_s is None else max(0.0, rest_s))
        except TimeoutError:
            raise self._ending.not_durable(timeout or 0.0) from None
        self._failures.report()

    async def drain(self, timeout: float | None = None) -> None:
        """`wait` for asyncio and trio."""
        with anyio.move_on_after(timeout) as scope:
            for promise in self._saves.pending:
                await promise.wait_done_async()
        if scope.cancelled_caught and timeout is not None:
            raise self._ending.not_durable(timeout)
        self._failures.report()

    # -- restoring -----------------------------------------------------------------------------

    def restore(
        self,
        which: Which = "latest",
        *,
        state: MutableMapping[str, Any] | None = None,
        only: str | Sequence[str] | None = None,
        strict: bool = True,
        finite: bool = False,
    ) -> CheckpointInfo | None:
        """Load a checkpoint into the live state, in place: all of it or nothing.

        Everything is read, verified and compared with the state before anything is changed. With
        ``which="latest"`` a damaged newest step is skipped with a warning for the next older one and
        moved aside, so that training can save that step again. With a mirror that is so only if its copy is
        damaged, too: the newest step that is whole in either root is taken, with a warning if it is the mirror's.

        Args:
            which: step number, ``"latest"``, ``"best"`` or a tag.
            state: what to restore into instead of the checkpointer's own state.
            only: glob patterns over ``/``-joined paths, such as ``"model/*"``.
            strict: whether missing, unexpected and mismatched entries are an error; otherwise they are
                left as they are and reported in ``CheckpointInfo.mismatch``.
            finite: refuse checkpoints that are known to hold NaN or infinity (``Staging(check_finite=True)``):
                ``"latest"`` treats them like damaged ones. Those that nobody looked at are taken.

        Returns:
            The checkpoint that was loaded; None when *which* is ``"latest"`` and there is none.

        Raises:
            CheckpointNotFoundError: no such checkpoint.
            StateMismatchError: the state differs; nothing was changed.
            CorruptCheckpointError: the checkpoint (for ``"latest"``: every one) is damaged.
            NonFiniteError: with *finite*: the checkpoint (for ``"latest"``: every one) is not.
        """
        self._ending.require_open()
        target = self._state if state is None else state
        if target is None:
            raise InvalidOptionError(
                "there is nothing to restore into: give Checkpointer(state=...) or restore(state=...)"
            )
        for promise in self._saves.pending:
            promise.wait_done()
        started = time.perf_counter()
        with self._books.narrator.restoring(), self._saves.lent_memory() as memory:
            into = RestoreTarget(target, memory, only, strict, finite)
            found = restore_in_place(self._store, self, which, into, self._mirror.open_store())
        if found is not None:
            self._books.note_restored(found, time.perf_counter() - started)
        return found

    # -- looking and deleting: for the rest see `Catalogue` ---------------------------------------

    def delete(self, which: Which) -> None:
        """Remove a committed checkpoint, here and on the mirror: `restore` must not bring it back.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint.
        """
        self._ending.require_open()
        committed = self.find(which)
        nonce = committed.header.nonce
        committed.delete()
        self._saves.forget_on_mirror(committed.step, nonce)
        self._books.note_deleted(committed.step)

    def statistics(self) -> Statistics:
        """Totals since this checkpointer was made."""
        return self._books.statistics()

    def health(self) -> Health:
        """What the checkpointer is doing now."""
        return self._mirror.complete_health(self._saves.health())

    # -- closing -------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Wait until everything is durable, then stop the writer and release the root. Idempotent.

        The newest step gets ``Mirror(close_timeout_s=)`` more to arrive on the mirror. When the training was
        told to stop, None waits no longer than its time allows. No save is taken from now on, whether this
        succeeds or not. In a forked child it does nothing.

        Args:
            timeout: seconds to wait; None waits for `close_timeout_s`, which is for ever unless it was set.

        Raises:
            TimeoutError: saves, or the mirror's last copy, are outstanding; the writer process finishes them by
                itself, and `close` may be called again.
            KeyboardInterrupt: Ctrl-C. One that comes while this waits is raised when everything is durable; a second
                one leaves at once, and the writer process finishes by itself.
            BusyError: called from a callback in a thread that this would wait for; nothing is closed.
            CheckpointError: a save failed and nobody looked at it; everything is closed all the same.
        """
        self._ending.close(timeout)

    @property
    def close_timeout_s(self) -> float | None:
        """How long leaving the block, the end of the interpreter, and `close` without a timeout wait for what is not
        durable; None, the default, waits for ever and says every 10 s what for. May be set at any time. See
        ``docs/shutdown.md``.
        """
        return self._ending.timeout_s

    @close_timeout_s.setter
    def close_timeout_s(self, seconds: float | None) -> None:
        self._ending.timeout_s = seconds

    async def aclose(self, timeout: float | None = None) -> None:
        """`close` for asyncio and trio; does not block the event loop.

        It is not broken off when the task is cancelled: the cancellation takes effect when everything is durable.
        In asyncio, cancelling the task a second time leaves at once.
        """
        await self._ending.aclose(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._last_save.rescue(error)
        with quiet_if(error):
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._last_save.rescue(error)
        with quiet_if(error):
            await self.aclose()

    # -- inside --------------------------------------------------------------------------------

    def _save_last(self, step: int, metrics: Mapping[str, float] | None) -> SaveFuture:
        return self._save(step, None, metrics, (), "emergency")

    def _saved_metrics(self) -> dict[int, Mapping[str, float]]:
        return {info.step: info.metrics for info in self.checkpoints()}

    def _note_end(self, promise: SavePromise, outcome: Outcome, error: BaseException | None) -> None:
        self._preempting.note_end(promise.future, outcome)
        self._books.note_end(promise, outcome, error)

    def __repr__(self) -> str:
        state = "closed" if self._ending.is_closed else f"{len(self._saves.pending)} pending"
        return f"<Checkpointer {self._store.url} {state}>"
