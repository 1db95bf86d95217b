"""Runs one job: compress each file of it straight out of the arena and into the step, or link it when unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from asyncckpt.format.files import FileDigest, encode_file
from asyncckpt.format.index import FileRecord
from asyncckpt.format.metadata import encode_array_metadata
from asyncckpt.repository.commit import StepWriter
from asyncckpt.writer.jobs import FileTask, Job, tensor_bytes
from asyncckpt.writer.previous import PreviousStep

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["JobResult", "put_recorded", "run_job"]

# Files up to this size are encoded into memory and written with one call.
_SMALL_FILE_BYTES = 1 * 2**20


@dataclass(slots=True)
class JobResult:
    """What a job wrote or linked, and the thread-seconds it took."""

    records: list[FileRecord]
    raw_bytes: int = 0
    linked_bytes: int = 0
    encode_s: float = 0.0
    write_s: float = 0.0


class _TimedSink:
    """Measures the time spent below a write callable."""

    __slots__ = ("_write", "seconds")

    def __init__(self, write: Callable[[Buffer], object]) -> None:
        self._write = write
        self.seconds = 0.0

    def __call__(self, data: Buffer) -> None:
        started = time.perf_counter()
        self._write(data)
        self.seconds += time.perf_counter() - started


def run_job(job: Job, arena: memoryview, step: StepWriter, previous: PreviousStep) -> JobResult:
    """Encode and write, or link, every file of *job*. Runs in a worker thread.

    Args:
        job: files whose tensors lie in *arena*.
        arena: the staged bytes.
        step: where the files go.
        previous: where unchanged files come from.

    Raises:
        StorageError: a write failed; the save is lost.
    """
    result = JobResult([])
    for task in job:
        _write_file(task, arena, step, previous, result)
    return result


def _write_file(task: FileTask, arena: memoryview, step: StepWriter, previous: PreviousStep, result: JobResult) -> None:
    started = time.perf_counter()
    write_s = 0.0
    spec = task.spec
    attributes = {} if spec.torch_dtype is None else {"asyncckpt": {"torch_dtype": spec.torch_dtype}}
    metadata = encode_array_metadata(task.layout, attributes)
    if task.is_first:
        before = time.perf_counter()
        result.records.append(put_recorded(step, f"{spec.key}/zarr.json", metadata))
        write_s += time.perf_counter() - before
    raw = arena[spec.offset : spec.offset + tensor_bytes(spec)]
    key = f"{spec.key}/{task.part.key}"
    raw_digest = xxhash.xxh3_128_hexdigest(raw[task.part.start : task.part.stop])
    before = time.perf_counter()
    record = previous.link(step, key, raw_digest, metadata)
    write_s += time.perf_counter() - before
    if record is not None:
        result.linked_bytes += record.bytes
    else:
        write = _stream_file if task.num_bytes > _SMALL_FILE_BYTES else _put_file
        digest, seconds = write(task, raw, key, step)
        record = FileRecord(key, digest.stored_bytes, digest.stored, raw_digest)
        write_s += seconds
    result.records.append(record)
    result.raw_bytes += task.num_bytes
    result.write_s += write_s
    result.encode_s += time.perf_counter() - started - write_s


def _put_file(task: FileTask, raw: memoryview, key: str, step: StepWriter) -> tuple[FileDigest, float]:
    pieces: list[Buffer] = []
    digest = encode_file(task.layout, task.part, raw, pieces.append)
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    before = time.perf_counter()
    step.put(key, data)
    return digest, time.perf_counter() - before


def _stream_file(task: FileTask, raw: memoryview, key: str, step: StepWriter) -> tuple[FileDigest, float]:
    before = time.perf_counter()
    file = step.create(key, task.num_bytes)
    sink = _TimedSink(file.write)
    sink.seconds = time.perf_counter() - before
    try:
        digest = encode_file(task.layout, task.part, raw, sink)
        before = time.perf_counter()
        file.close()
        sink.seconds += time.perf_counter() - before
    except BaseException:
        file.abort()
        raise
    return digest, sink.seconds


def put_recorded(step: StepWriter, key: str, data: bytes) -> FileRecord:
    """Write a small uncompressed file; its stored and raw digests are the same."""
    step.put(key, data)
    digest = xxhash.xxh3_128_hexdigest(data)
    return FileRecord(key, len(data), digest, digest)
