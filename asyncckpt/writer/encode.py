"""Files of a step: compressed straight out of the arena, or linked when they did not change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import xxhash

from asyncckpt.format.files import FileDigest, FileEncoder
from asyncckpt.format.index import FileRecord
from asyncckpt.format.metadata import encode_array_metadata
from asyncckpt.interpreter import Lane
from asyncckpt.repository.commit import StepWriter
from asyncckpt.stores.contract import FileSink
from asyncckpt.writer.cores import CoreBudget
from asyncckpt.writer.finite import holds_non_finite, type_of_values
from asyncckpt.writer.jobs import FileTask, Job, tensor_bytes
from asyncckpt.writer.previous import PreviousStep
from asyncckpt.writer.rates import CompressionRates
from asyncckpt.writer.urgency import Urgency

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FileWriter", "JobResult", "put_recorded"]

# Files up to this size are encoded into memory and written with one call.
_SMALL_FILE_BYTES = 1 * 2**20


@dataclass(slots=True)
class JobResult:
    """What a job wrote or linked, and the thread-seconds it took, without those spent waiting for a core.

    ``non_finite`` has the keys of arrays with NaN or infinity, if they were searched.
    """

    records: list[FileRecord]
    raw_bytes: int = 0
    linked_bytes: int = 0
    encode_s: float = 0.0
    write_s: float = 0.0
    non_finite: list[str] = field(default_factory=list)

    def add_written(self, file: _File, digest: FileDigest) -> None:
        self.records.append(FileRecord(file.key, digest.stored_bytes, digest.stored, digest.raw))
        self.raw_bytes += file.task.num_bytes


@dataclass(slots=True)
class _File:
    """A file on its way.

    Attributes:
        raw: all bytes of its array.
        metadata: ``zarr.json`` of its array.
        raw_digest: of its part of *raw*, if that was needed.
        encoded: what is to be written and its digests, if it is small and was encoded.
    """

    task: FileTask
    key: str
    raw: memoryview
    metadata: bytes
    raw_digest: str | None = None
    encoded: tuple[Buffer, FileDigest] | None = None


class FileWriter:
    """Writes, or links, the files of one step. Any thread may call it.

    Encoding takes a core, writing waits for the disk: more threads than cores call this, and *cores*
    keeps all but so many of them from computing at once. So the disk never waits for a core nor a core
    for the disk, and training is left the others.

    Args:
        step: where the files go.
        previous: where unchanged files come from.
        cores: how many threads may encode at a time.
        urgency: whether to compress, and whether to go on.
        rates: whether compressing pays; None always compresses.
        check_finite: whether to search for NaN and infinity.
    """

    def __init__(
        self,
        step: StepWriter,
        previous: PreviousStep,
        cores: CoreBudget,
        urgency: Urgency,
        rates: CompressionRates | None = None,
        *,
        check_finite: bool = False,
    ) -> None:
        self._step = step
        self._rates = rates
        self._previous = previous
        self._cores = cores
        self._urgency = urgency
        self._check_finite = check_finite
        self._lane = Lane()

    def run(self, job: Job, arena: memoryview) -> JobResult:
        """Write every file of *job*, whose tensors lie in *arena*.

        Raises:
            StorageError: a write failed; the save is lost.
            PutBackError: another save goes first.
        """
        result = JobResult([])
        small = [task for task in job if task.num_bytes <= _SMALL_FILE_BYTES]
        if small:
            with self._lane.batch(len(small)):
                with self._cores, _timed(result, "encode_s"):
                    prepared = [self._prepare(task, arena, result) for task in small]
                for file in prepared:
                    self._write_small(file, result)
        for task in job:
            if task.num_bytes > _SMALL_FILE_BYTES:
                with self._cores, _timed(result, "encode_s"):
                    file = self._prepare(task, arena, result)
                self._write_large(file, result)
        return result

    def _prepare(self, task: FileTask, arena: memoryview, result: JobResult) -> _File:
        spec = task.spec
        attributes = {} if spec.torch_dtype is None else {"asyncckpt": {"torch_dtype": spec.torch_dtype}}
        raw = arena[spec.offset : spec.offset + tensor_bytes(spec)]
        file = _File(task, f"{spec.key}/{task.part.key}", raw, encode_array_metadata(task.layout, attributes))
        # The digest of the raw bytes is needed first only if the previous step may hold the same: else it comes
        # with encoding, and they are read once.
        part = raw[task.part.start : task.part.stop]
        if self._check_finite and holds_non_finite(part, type_of_values(spec)):
            result.non_finite.append(spec.key)
        if self._previous.may_hold(file.key, part):
            file.raw_digest = xxhash.xxh3_128_hexdigest(part)
        elif task.num_bytes <= _SMALL_FILE_BYTES:
            file.encoded = self._encode_whole(file)
        return file

    def _encode_whole(self, file: _File) -> tuple[Buffer, FileDigest]:
        encoder = self._encoder(file)
        pieces = [piece for chunk in encoder for piece in chunk]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), encoder.digest

    def _encoder(self, file: _File) -> FileEncoder:
        task = file.task
        return FileEncoder(task.layout, task.part, file.raw, file.raw_digest, self._before_chunk)

    def _before_chunk(self, num_bytes: int) -> bool:
        return self._urgency.before_chunk(num_bytes) and self._is_worth_compressing()

    def _is_worth_compressing(self) -> bool:
        return self._rates is None or self._rates.is_worth_compressing(self._cores.limit)

    def _write_small(self, file: _File, result: JobResult) -> None:
        if self._begin(file, result):
            return
        if file.encoded is None:
            with self._cores, _timed(result, "encode_s"):
                file.encoded = self._encode_whole(file)
        data, digest = file.encoded
        with _timed(result, "write_s"):
            self._step.put(file.key, data)
        result.add_written(file, digest)

    def _write_large(self, file: _File, result: JobResult) -> None:
        if self._begin(file, result):
            return
        encoder = self._encoder(file)
        self._stream(encoder, file.key, file.task.num_bytes, result)
        result.add_written(file, encoder.digest)

    def _begin(self, file: _File, result: JobResult) -> bool:
        """Write the metadata of the array, and link the file if it did not change; whether that was all."""
        with _timed(result, "write_s"):
            if file.task.is_first:
                result.records.append(put_recorded(self._step, f"{file.task.spec.key}/zarr.json", file.metadata))
            if file.raw_digest is None:
                return False
            record = self._previous.link(self._step, file.key, file.raw_digest, file.metadata)
        if record is None:
            return False
        self._urgency.before_chunk(file.task.num_bytes)  # a link is progress too, and a place to stop at
        result.records.append(record)
        result.raw_bytes += file.task.num_bytes
        result.linked_bytes += record.bytes
        return True

    def _stream(self, encoder: FileEncoder, key: str, num_bytes: int, result: JobResult) -> None:
        chunks = iter(encoder)
        with _timed(result, "write_s"):
            file = self._step.create(key, num_bytes)
        with file:
            written_bytes = 0
            while pieces := self._encode_until_full(encoder, chunks, file, result):
                with _timed(result, "write_s"), self._writing(encoder.stored_bytes - written_bytes):
                    for piece in pieces:
                        file.write(piece)
                written_bytes = encoder.stored_bytes

    def _encode_until_full(
        self, encoder: FileEncoder, chunks: Iterator[tuple[Buffer, ...]], file: FileSink, result: JobResult
    ) -> tuple[Buffer, ...]:
        """Encode into the buffer of *file*, on one core all the while; the pieces for which it must be written."""
        with self._cores, _timed(result, "encode_s"), self._compressing(encoder):
            for pieces in chunks:
                if sum(memoryview(piece).nbytes for piece in pieces) > file.room_bytes:
                    return pieces
                for piece in pieces:
                    file.write(piece)
        return ()

    def _writing(self, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._rates is None else self._rates.writing(num_bytes)

    @contextlib.contextmanager
    def _compressing(self, encoder: FileEncoder) -> Iterator[None]:
        if self._rates is None or not (self._urgency.compress and self._is_worth_compressing()):
            yield
            return
        started, before_bytes = time.perf_counter(), encoder.raw_bytes
        yield
        self._rates.note_compressed(encoder.raw_bytes - before_bytes, time.perf_counter() - started)


@contextlib.contextmanager
def _timed(result: JobResult, name: Literal["encode_s", "write_s"]) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(result, name, getattr(result, name) + time.perf_counter() - started)


def put_recorded(step: StepWriter, key: str, data: bytes) -> FileRecord:
    """Write a small uncompressed file; its stored and raw digests are the same."""
    step.put(key, data)
    digest = xxhash.xxh3_128_hexdigest(data)
    return FileRecord(key, len(data), digest, digest)
