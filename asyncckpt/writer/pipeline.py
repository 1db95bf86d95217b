"""One save from staged memory to a committed step: encode and write in threads, then commit.

The data flows through bounded anyio streams: segments (parts of the snapshot) in, jobs to the encode
workers. Memory is bounded by one encode buffer per worker, whatever the size of the state.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import ObjectReceiveStream

from asyncckpt.errors import StepExistsError
from asyncckpt.format.header import Header, encode_header_file
from asyncckpt.format.index import encode_index
from asyncckpt.format.metadata import encode_group_metadata
from asyncckpt.model import TensorSpec
from asyncckpt.options import Compression
from asyncckpt.repository.catalog import CommittedStep
from asyncckpt.repository.commit import StepWriter, sync_renames
from asyncckpt.stores.contract import Store
from asyncckpt.writer.cores import choose_workers
from asyncckpt.writer.encode import FileWriter, put_recorded
from asyncckpt.writer.jobs import Job, plan_jobs
from asyncckpt.writer.messages import Save, WriteStats
from asyncckpt.writer.previous import PreviousStep
from asyncckpt.writer.rates import CompressionRates
from asyncckpt.writer.stale import TrainingWatch, digest_of
from asyncckpt.writer.urgency import Urgency
from asyncckpt.writer.warn import save_warnings
from asyncckpt.writer.written import Written

__all__ = ["Pipeline", "Segment"]

_RANK = 0
_decode_tensors = msgspec.json.Decoder(list[TensorSpec]).decode


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the snapshot: its tensors lie in *buffer*, which may be reused once `release` ran."""

    tensors: msgspec.Raw
    buffer: memoryview
    release: Callable[[], Awaitable[None]]


class Pipeline:
    """Writes saves to one store, one after the other.

    Args:
        store: the checkpoint root.
        compression: preset or codec list for every array.
        threads: see `options.Writer`.
        incremental: link what did not change since the previous step, where the store can.
        is_own_process: see `cores.choose_workers`.
        urgency: what the encode threads look at.
        check_finite: search for NaN and infinity, and mark steps that hold some.
    """

    def __init__(
        self,
        store: Store,
        compression: Compression,
        threads: int | None,
        *,
        incremental: bool = True,
        is_own_process: bool = False,
        urgency: Urgency | None = None,
        check_finite: bool = False,
    ) -> None:
        self._store = store
        self._compression = compression
        self._num_workers, self._cores = choose_workers(threads, is_own_process=is_own_process)
        self._limiter = anyio.CapacityLimiter(self._num_workers)
        self._urgency = urgency or Urgency()
        self._previous = PreviousStep(store, incremental=incremental)
        self._watch = TrainingWatch()
        self._check_finite = check_finite
        # Only "fast" leaves it to us; and who chose the threads gets the same bytes every time.
        self._rates = CompressionRates() if compression == "fast" and threads is None else None

    def hurry(self) -> None:
        """Use every core that may be used from now on, also for what is being written."""
        self._cores.take_all()

    async def write(
        self,
        save: Save,
        segments: AsyncIterator[Segment],
        on_progress: Callable[[int], Awaitable[None]],
        attempt: int = 0,
    ) -> WriteStats:
        """Write and commit *save*. When this returns, the step survives a power cut.

        Args:
            save: identity and header fields.
            segments: the snapshot; ends after its last part.
            on_progress: called with the raw bytes written so far.
            attempt: counts up when a write that failed, or was put back, is repeated.

        Raises:
            StorageError: nothing was committed; the partial step was removed.
            StepExistsError: another write committed this step first.
            PutBackError: `Urgency.put_back` was called; also in a group. Nothing was committed.
        """
        self._urgency.begin()
        if self._rates is not None:
            self._rates.begin()
        try:
            return await self._write(save, segments, on_progress, attempt)
        except StepExistsError:
            # Ours all the same if a writer before this one was killed between the rename and its answer.
            # An earlier attempt of this writer, though, failed, and what it left must not be acknowledged.
            if attempt:
                raise
            return await anyio.to_thread.run_sync(self._confirm_own_commit, save)

    async def _write(
        self,
        save: Save,
        segments: AsyncIterator[Segment],
        on_progress: Callable[[int], Awaitable[None]],
        attempt: int,
    ) -> WriteStats:
        step = await anyio.to_thread.run_sync(StepWriter.begin, self._store, save.step, save.nonce, attempt)
        try:
            written = Written()
            files = FileWriter(
                step, self._previous, self._cores, self._urgency, self._rates, check_finite=self._check_finite
            )
            await anyio.to_thread.run_sync(self._previous.begin)
            async for segment in segments:
                await self._write_segment(segment, files, written, on_progress)
                await segment.release()
            started = time.perf_counter()
            header = await anyio.to_thread.run_sync(self._finish_index, save, step, written)
            await anyio.to_thread.run_sync(step.commit, encode_header_file(header))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(step.abort)
            raise
        self._previous.remember(save.step, save.nonce, written.records)
        earlier_step = self._watch.earlier_step(save, written.trained_digest)
        self._watch.remember(save, written.trained_digest)
        return WriteStats(
            encode_s=written.encode_s,
            write_s=written.write_s,
            commit_s=time.perf_counter() - started,
            raw_bytes=written.raw_bytes,
            stored_bytes=header.stored_bytes,
            num_arrays=written.num_arrays,
            linked_bytes=written.linked_bytes,
            finite=written.finite,
            stale=earlier_step is not None,
            warnings=list(save_warnings(written.non_finite, earlier_step)),
        )

    async def _write_segment(
        self, segment: Segment, files: FileWriter, written: Written, on_progress: Callable[[int], Awaitable[None]]
    ) -> None:
        tensors = await anyio.to_thread.run_sync(_decode_tensors, segment.tensors)
        plan = await anyio.to_thread.run_sync(plan_jobs, tensors, self._compression)
        written.num_arrays += plan.num_arrays
        written.trained.update(spec.key for spec in tensors if spec.trained)
        for spec in plan.inline:
            written.add_inline(spec, segment.buffer, check_finite=self._check_finite)
        send, receive = anyio.create_memory_object_stream[Job](self._num_workers)

        async def work(jobs: ObjectReceiveStream[Job]) -> None:
            async with jobs:
                async for job in jobs:
                    result = await anyio.to_thread.run_sync(files.run, job, segment.buffer, limiter=self._limiter)
                    written.add(result)
                    await on_progress(written.raw_bytes)

        async with anyio.create_task_group() as tasks, send:
            for _ in range(self._num_workers):
                tasks.start_soon(work, receive.clone())
            receive.close()
            for job in plan.jobs:
                try:
                    await send.send(job)
                except anyio.BrokenResourceError:
                    break  # every worker has failed; what they met is the error of the group
            send.close()

    def _finish_index(self, save: Save, step: StepWriter, written: Written) -> Header:
        # "state/model/w/zarr.json": "state/model/w" is an array, what lies above it are groups.
        parents = {record.key.rsplit("/", 2)[0] for record in written.records}
        groups = {"state", "index"}.union(*map(_with_those_above, parents))
        metadata = encode_group_metadata()
        written.records += [put_recorded(step, f"{group}/zarr.json", metadata) for group in sorted(groups)]
        array_metadata, chunk, reference = encode_index(written.records, rank=_RANK)
        step.put(f"{reference.key}/zarr.json", array_metadata)
        step.put(f"{reference.key}/c.0", chunk)
        stored_bytes = written.stored_bytes + len(array_metadata) + len(chunk)
        if self._check_finite:
            written.finite = not written.non_finite
        written.trained_digest = digest_of(written.trained, written.records, written.inline)
        return written.header(save, [reference], stored_bytes)

    def _confirm_own_commit(self, save: Save) -> WriteStats:
        # It may be acknowledged only once the rename itself is durable.
        header = CommittedStep(self._store, save.step).header
        if header.nonce != save.nonce:
            raise StepExistsError(
                f"step {save.step} is already committed at {self._store.location('')}; delete it first", step=save.step
            )
        sync_renames(self._store)
        return WriteStats(
            encode_s=0.0,
            write_s=0.0,
            commit_s=0.0,
            raw_bytes=header.raw_bytes,
            stored_bytes=header.stored_bytes,
            num_arrays=header.arrays,
            finite=None if header.finite is msgspec.UNSET else header.finite,
        )


def _with_those_above(group: str) -> Iterable[str]:
    parts = group.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
