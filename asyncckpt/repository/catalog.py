"""What is committed in a root. Readers take no lock: committed steps are immutable, but may vanish at any time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, CorruptError, StorageError
from asyncckpt.format.header import Header, decode_header_file, info_from_header
from asyncckpt.format.index import FileRecord, IndexRef, decode_index
from asyncckpt.format.limits import MAX_HEADER_BYTES, MAX_METADATA_BYTES
from asyncckpt.format.paths import parse_step_name, step_name
from asyncckpt.model import CheckpointInfo
from asyncckpt.repository.names import HEADER, header_key
from asyncckpt.stores.contract import Store

__all__ = ["ABSENT", "UNREADABLE", "Catalog", "CommittedStep", "DamagedStep"]

ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
"""Errno of a file that is not there."""
UNREADABLE = frozenset(
    {
        errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO),
        errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG,
    }
)  # fmt: skip
"""Errno of what a medium, a file system check or a tampered step gives. Anything else (EACCES, ESTALE, ...) says
nothing about the checkpoint and must not make a restore fall back to an older one in silence."""
_T = TypeVar("_T")


class CommittedStep:
    """One step of a root. Header and info are read on demand and only once.

    Args:
        store: the root.
        step: number of a step that was committed; whether it still is shows when something is read.
        prefix: where it lies, if it was moved.
    """

    def __init__(self, store: Store, step: int, prefix: str | None = None) -> None:
        self.store = store
        self.step = step
        self.prefix = step_name(step) if prefix is None else prefix

    def __repr__(self) -> str:
        return f"CommittedStep({self.location!r})"

    @property
    def location(self) -> str:
        """Absolute path (or URL) of the step."""
        return self.store.location(self.prefix)

    @cached_property
    def header(self) -> Header:
        """The verified header.

        Raises:
            CheckpointNotFoundError: the step is not committed, or not any more.
            CorruptCheckpointError: its header is damaged, or is the header of another step.
            UnsupportedFormatError: written by a newer version.
            StorageError: it cannot be read.
        """
        # Not even read when it is too long: a sparse file of any size costs nothing to make.
        if self.read_file(HEADER, 1, MAX_HEADER_BYTES):
            raise self._corrupt(HEADER, f"it has more than the limit of {MAX_HEADER_BYTES} bytes")
        data = self.read_file(HEADER, MAX_HEADER_BYTES)
        header = self._checked(HEADER, lambda: decode_header_file(data))
        if header.step != self.step:
            raise self._corrupt(HEADER, f"it is the header of step {header.step}")
        return header

    @cached_property
    def info(self) -> CheckpointInfo:
        """What the header says; raises what `header` does."""
        return self._checked(HEADER, lambda: info_from_header(self.header, self.location))

    def read_index(self) -> list[FileRecord]:
        """Every file of the step but the header and the index itself, keys relative to the step.

        Raises:
            CheckpointNotFoundError: the step was deleted meanwhile.
            CorruptCheckpointError: an index is missing or damaged.
            StorageError: it cannot be read.
        """
        records = {}
        for reference in self.header.indexes:
            for record in self.read_index_of(reference):
                if record.key in records:
                    raise self._corrupt(reference.key, f"{record.key} is in the index of another rank too")
                records[record.key] = record
        return list(records.values())

    def read_index_of(self, reference: IndexRef) -> list[FileRecord]:
        """`read_index` of one rank."""
        metadata = self.read_file(f"{reference.key}/zarr.json", MAX_METADATA_BYTES)
        chunk = self.read_file(f"{reference.key}/c.0", reference.bytes + 1)
        return self._checked(reference.key, lambda: decode_index(reference, metadata, chunk))

    def read_file(self, key: str, length: int, offset: int = 0) -> bytes:
        """The bytes of one file of the step from *offset* on, at most *length*.

        Raises:
            CheckpointNotFoundError: the step was deleted meanwhile.
            CorruptCheckpointError: this file is missing.
            StorageError: it cannot be read.
        """
        try:
            return self.store.read(f"{self.prefix}/{key}", offset, length)
        except StorageError as error:
            if error.errno in UNREADABLE:
                raise self._corrupt(key, error.message) from error
            if error.errno not in ABSENT:
                raise
            if key == HEADER:
                raise self._not_found() from None
            self._require_header()
            raise self._corrupt(key, "the file is missing") from error

    def _require_header(self) -> None:
        if not any(entry.name == HEADER for entry in self.store.entries(self.prefix)):
            raise self._not_found()

    def require_unchanged(self) -> None:
        """Tell damage from absence: what is missing or different in a deleted step is no damage.

        Raises:
            CheckpointNotFoundError: the step was deleted since its header was read, or deleted and
                written again.
        """
        if CommittedStep(self.store, self.step, self.prefix).header.nonce != self.header.nonce:
            raise self._not_found()

    def delete(self) -> None:
        """Remove the step, header first: a half-deleted step is never offered. The caller holds the root's lock.

        Raises:
            CheckpointNotFoundError: it is not there.
            StorageError: it cannot be removed completely. Once the header is gone the rest is left to
                `root.clean_partials`.
        """
        self._require_header()
        self.store.delete(header_key(self.step))
        self.store.sync_directory(self.prefix)
        self.store.delete(self.prefix)

    def _checked(self, key: str, decode: Callable[[], _T]) -> _T:
        """Run *decode*, adding to its error which step and file it is about."""
        try:
            return decode()
        except CorruptCheckpointError as error:
            raise self._corrupt(key, error.message) from error

    def _corrupt(self, key: str, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"step {self.step} is damaged: {key}: {reason}",
            step=self.step,
            key=key,
            path=self.location,
            damaged=[{"key": key, "reason": reason}],
        )

    def _not_found(self) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(f"there is no committed step {self.step} at {self.store.url}", step=self.step)


@dataclass(frozen=True, slots=True)
class DamagedStep:
    """A step whose header cannot be read: it is skipped, counts nowhere, and is removed by nobody."""

    step: int
    error: CorruptError


class Catalog:
    """The committed steps of a root.

    Args:
        store: the root.

    Attributes:
        damaged: steps that the last `committed` or `find` met and could not read, newest first.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.damaged: tuple[DamagedStep, ...] = ()

    def __repr__(self) -> str:
        return f"Catalog({self.store.url!r})"

    def steps(self) -> list[int]:
        """Steps that have a header, in ascending order; it was not read yet, so it may be damaged."""
        numbered = [(parse_step_name(entry.name), entry) for entry in self.store.entries("") if entry.is_directory]
        return sorted(
            step
            for step, entry in numbered
            if step is not None and any(below.name == HEADER for below in self.store.entries(entry.name))
        )

    def committed(self) -> list[CommittedStep]:
        """All readable steps, newest first, their headers read; the others are in `damaged`.

        Raises:
            StorageError: the root cannot be read.
        """
        return list(self._newest_first())

    def find(self, which: int | str = "latest") -> CommittedStep:
        """The step that *which* names.

        Args:
            which: a step number; ``"latest"``, the newest readable step (newer damaged ones are in
                `damaged`); or a tag, of which the newest step that has it is meant.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: the numbered step has a damaged header.
            UnsupportedFormatError: the numbered step was written by a newer version.
            StorageError: the root cannot be read.
        """
        if isinstance(which, int):
            committed = CommittedStep(self.store, which)
            _ = committed.info
            return committed
        for committed in self._newest_first():
            if which == "latest" or which in committed.header.tags:
                return committed
        what = "committed step" if which == "latest" else f"committed step tagged {which!r}"
        skipped = ", ".join(str(damaged.step) for damaged in self.damaged)
        hint = f" (steps {skipped} are damaged)" if skipped else ""
        raise CheckpointNotFoundError(f"there is no {what} at {self.store.url}{hint}", which=which)

    def _newest_first(self) -> Iterator[CommittedStep]:
        self.damaged = ()
        for step in reversed(self.steps()):
            committed = CommittedStep(self.store, step)
            try:
                _ = committed.info
            except CheckpointNotFoundError:
                continue  # deleted since it was listed
            except CorruptError as error:
                self.damaged += (DamagedStep(step, error),)
            else:
                yield committed
