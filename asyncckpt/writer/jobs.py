"""Cuts a snapshot into jobs of bounded size for the encode threads. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncckpt.format.codecs import resolve_codecs
from asyncckpt.format.dtypes import DATA_TYPES
from asyncckpt.format.layout import CACHED_CHUNK_BYTES, CHUNK_BYTES, INLINE_BYTES, ArrayLayout, FilePart, plan_layout
from asyncckpt.model import TensorSpec
from asyncckpt.options import Compression

__all__ = ["FileTask", "Job", "JobPlan", "plan_jobs"]

_JOB_BYTES = 4 * 2**20
_JOB_FILES = 64


@dataclass(frozen=True, slots=True)
class FileTask:
    """One chunk or shard file to write; the task of an array's first file also writes its ``zarr.json``."""

    spec: TensorSpec
    layout: ArrayLayout
    part: FilePart
    is_first: bool

    @property
    def num_bytes(self) -> int:
        return self.part.stop - self.part.start


Job = tuple[FileTask, ...]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Jobs, largest first, and the tensors small enough to live in the header."""

    jobs: tuple[Job, ...]
    inline: tuple[TensorSpec, ...]
    num_arrays: int


def tensor_bytes(spec: TensorSpec) -> int:
    """Raw bytes of the tensor."""
    count = 1
    for length in spec.shape:
        count *= length
    return count * DATA_TYPES[spec.data_type].itemsize


def plan_jobs(tensors: Sequence[TensorSpec], compression: Compression) -> JobPlan:
    """Distribute *tensors*: a large file is a job of its own, small ones travel together.

    Largest first, so that no thread starts a long file when the others are about to finish.

    Raises:
        InvalidOptionError: the codec list does not fit a data type.
    """
    inline: list[TensorSpec] = []
    tasks: list[FileTask] = []
    num_arrays = 0
    for spec in tensors:
        if tensor_bytes(spec) <= INLINE_BYTES:
            inline.append(spec)
            continue
        num_arrays += 1
        data_type = DATA_TYPES[spec.data_type]
        codecs = resolve_codecs(compression, data_type)
        layout = plan_layout(spec.shape, data_type, codecs, chunk_bytes=_chunk_bytes(compression))
        tasks.extend(FileTask(spec, layout, part, index == 0) for index, part in enumerate(layout.files()))
    tasks.sort(key=lambda task: -task.num_bytes)
    return JobPlan(tuple(_group(tasks)), tuple(inline), num_arrays)


def _chunk_bytes(compression: Compression) -> int:
    # What these two do per byte is so little that memory traffic is what matters. "small" compresses blocks of 1 MiB,
    # and who lists codecs may have thought of as much.
    return CACHED_CHUNK_BYTES if compression in ("fast", "none") else CHUNK_BYTES


def _group(tasks: Sequence[FileTask]) -> list[Job]:
    jobs: list[Job] = []
    current: list[FileTask] = []
    size = 0
    for task in tasks:
        if current and (size + task.num_bytes > _JOB_BYTES or len(current) >= _JOB_FILES):
            jobs.append(tuple(current))
            current, size = [], 0
        current.append(task)
        size += task.num_bytes
    if current:
        jobs.append(tuple(current))
    return jobs
