"""Files of a step: compressed straight out of the arena, or linked when they did not change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import xxhash

from asyncckpt.format.files import FileEncoder
from asyncckpt.format.index import FileRecord
from asyncckpt.format.metadata import encode_array_metadata
from asyncckpt.repository.commit import StepWriter
from asyncckpt.stores.contract import FileSink
from asyncckpt.writer.cores import CoreBudget
from asyncckpt.writer.jobs import FileTask, Job, tensor_bytes
from asyncckpt.writer.previous import PreviousStep
from asyncckpt.writer.urgency import Urgency

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FileWriter", "JobResult", "put_recorded"]

# Files up to this size are encoded into memory and written with one call.
_SMALL_FILE_BYTES = 1 * 2**20


@dataclass(slots=True)
class JobResult:
    """What a job wrote or linked, and the thread-seconds it took, without those spent waiting for a core."""

    records: list[FileRecord]
    raw_bytes: int = 0
    linked_bytes: int = 0
    encode_s: float = 0.0
    write_s: float = 0.0


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
    """

    def __init__(self, step: StepWriter, previous: PreviousStep, cores: CoreBudget, urgency: Urgency) -> None:
        self._step = step
        self._previous = previous
        self._cores = cores
        self._urgency = urgency

    def run(self, job: Job, arena: memoryview) -> JobResult:
        """Write every file of *job*, whose tensors lie in *arena*.

        Raises:
            StorageError: a write failed; the save is lost.
            PutBackError: another save goes first.
        """
        result = JobResult([])
        for task in job:
            self._write(task, arena, result)
        return result

    def _write(self, task: FileTask, arena: memoryview, result: JobResult) -> None:
        spec = task.spec
        attributes = {} if spec.torch_dtype is None else {"asyncckpt": {"torch_dtype": spec.torch_dtype}}
        metadata = encode_array_metadata(task.layout, attributes)
        if task.is_first:
            with _timed(result, "write_s"):
                result.records.append(put_recorded(self._step, f"{spec.key}/zarr.json", metadata))
        raw = arena[spec.offset : spec.offset + tensor_bytes(spec)]
        key = f"{spec.key}/{task.part.key}"
        raw_digest = self._digest_if_unchanged(task, raw, key, result)
        record = None
        if raw_digest is not None:
            with _timed(result, "write_s"):
                record = self._previous.link(self._step, key, raw_digest, metadata)
        if record is not None:
            result.linked_bytes += record.bytes
        else:
            encoder = FileEncoder(task.layout, task.part, raw, raw_digest, self._urgency.before_chunk)
            write = self._stream if task.num_bytes > _SMALL_FILE_BYTES else self._put
            write(encoder, key, task.num_bytes, result)
            digest = encoder.digest
            record = FileRecord(key, digest.stored_bytes, digest.stored, digest.raw)
        result.records.append(record)
        result.raw_bytes += task.num_bytes

    def _digest_if_unchanged(self, task: FileTask, raw: memoryview, key: str, result: JobResult) -> str | None:
        """Digest of the raw bytes, if they may be those of the previous step; only then it pays to read them twice."""
        part = raw[task.part.start : task.part.stop]
        with self._cores, _timed(result, "encode_s"):
            if not self._previous.may_hold(key, part):
                return None
            digest: str = xxhash.xxh3_128_hexdigest(part)
            return digest

    def _put(self, encoder: FileEncoder, key: str, num_bytes: int, result: JobResult) -> None:
        with self._cores, _timed(result, "encode_s"):
            pieces = [piece for chunk in encoder for piece in chunk]
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        with _timed(result, "write_s"):
            self._step.put(key, data)

    def _stream(self, encoder: FileEncoder, key: str, num_bytes: int, result: JobResult) -> None:
        chunks = iter(encoder)
        with _timed(result, "write_s"):
            file = self._step.create(key, num_bytes)
        with file:
            while pieces := self._encode_until_full(chunks, file, result):
                with _timed(result, "write_s"):
                    for piece in pieces:
                        file.write(piece)

    def _encode_until_full(
        self, chunks: Iterator[tuple[Buffer, ...]], file: FileSink, result: JobResult
    ) -> tuple[Buffer, ...]:
        """Encode into the buffer of *file*, on one core all the while; the pieces for which it must be written."""
        with self._cores, _timed(result, "encode_s"):
            for pieces in chunks:
                if sum(memoryview(piece).nbytes for piece in pieces) > file.room_bytes:
                    return pieces
                for piece in pieces:
                    file.write(piece)
        return ()


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
