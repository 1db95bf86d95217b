"""Every error asyncckpt raises, as one tree grouped by what a handler would do.

::

    CheckpointError
    ├── UsageError                the caller can fix it; retrying unchanged never helps
    │   ├── ClosedError               the checkpointer was closed
    │   ├── InvalidOptionError        a bad option or argument (also ValueError)
    │   ├── UnsupportedStateError     a state value that cannot be stored (also TypeError)
    │   ├── StateMismatchError        the checkpoint does not fit the live state
    │   ├── GraphCaptureError         save() was called while a CUDA graph is being captured
    │   ├── StepExistsError           that step is already committed
    │   ├── CheckpointNotFoundError   no such step, tag, or root (also LookupError)
    │   │   └── NothingCommittedError     the root holds no committed step at all
    │   └── ForeignRootError          the directory holds something that is not ours
    ├── BusyError                 wait, or stop the other one
    │   ├── RootLockedError           another run writes to this root
    │   ├── SaveSkippedError          the save was dropped: every staging slot was taken
    │   └── SaveSupersededError       the save gave its place to a newer one
    ├── SaveCancelledError        the caller cancelled the save (also concurrent.futures.CancelledError)
    ├── StorageError              the world broke: disk, network, permissions (also OSError, keeps errno)
    ├── WriterError               the background writer broke
    │   └── WriterDiedError           it ended without acknowledging the save
    ├── StagingError              the device failed while the snapshot was copied
    │   └── StagingMemoryError        no memory for the snapshot (also MemoryError)
    ├── SnapshotMutatedError      the state changed under the snapshot; it was not written
    └── CorruptError              stored bytes are not what was written, or not what may be used
        ├── CorruptCheckpointError    a committed step is damaged
        ├── NonFiniteError            it holds NaN or infinity, and only finite ones were wanted
        └── UnsupportedFormatError    written by a newer asyncckpt, or not in our format

Codes are stable and may be matched on by programs. All errors survive pickling and the
writer's message protocol with their type and fields.
"""

from __future__ import annotations

import os
from concurrent.futures import CancelledError
from typing import Any, ClassVar

__all__ = [
    "BusyError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClosedError",
    "CorruptCheckpointError",
    "CorruptError",
    "ForeignRootError",
    "GraphCaptureError",
    "InvalidOptionError",
    "NonFiniteError",
    "NothingCommittedError",
    "RootLockedError",
    "SaveCancelledError",
    "SaveSkippedError",
    "SaveSupersededError",
    "SnapshotMutatedError",
    "StagingError",
    "StagingMemoryError",
    "StateMismatchError",
    "StepExistsError",
    "StorageError",
    "UnsupportedFormatError",
    "UnsupportedStateError",
    "UsageError",
    "WriterDiedError",
    "WriterError",
    "error_from_fields",
    "error_to_fields",
]

Fields = dict[str, Any]

_BY_CODE: dict[str, type[CheckpointError]] = {}


class CheckpointError(Exception):
    """Base of every error this package raises.

    Args:
        message: what failed and what to do next, one sentence each.
        fields: machine-readable context (``step``, ``rank``, ``key``, ``path``, ...), JSON values
            only. Each is readable as an attribute of ``error.fields`` and is kept by pickling.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _BY_CODE[cls.code] = cls

    def __init__(self, message: str, /, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields: Fields = fields

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        extras = "".join(f", {name}={value!r}" for name, value in self.fields.items())
        return f"{type(self).__name__}({self.message!r}{extras})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(cls: type[CheckpointError], message: str, fields: Fields) -> CheckpointError:
    return cls(message, **fields)


class UsageError(CheckpointError):
    """The caller asked for something that cannot be done; retrying unchanged never helps."""

    code = "usage"


class ClosedError(UsageError):
    """The checkpointer (or its future) was used after ``close()``."""

    code = "closed"


class InvalidOptionError(UsageError, ValueError):
    """An option or argument has a value outside its documented range."""

    code = "invalid_option"


class UnsupportedStateError(UsageError, TypeError):
    """A value in the state cannot be stored; ``fields["key"]`` is its path, ``fields["type"]`` its type."""

    code = "unsupported_state"


class StateMismatchError(UsageError):
    """Checkpoint and live state differ.

    ``fields``: ``missing`` (in the state, not in the checkpoint), ``unexpected`` (the reverse) and
    ``mismatched`` (both, with another shape or type), each a list of keys.
    """

    code = "state_mismatch"


class StepExistsError(UsageError):
    """The step is already committed; committed steps are immutable."""

    code = "step_exists"


class GraphCaptureError(UsageError):
    """A snapshot cannot be taken while a CUDA graph is being captured; replaying one is fine."""

    code = "graph_capture"


class CheckpointNotFoundError(UsageError, LookupError):
    """No committed checkpoint answers to that step, tag or name."""

    code = "not_found"


class NothingCommittedError(CheckpointNotFoundError):
    """The root holds no committed step at all (it may not even exist)."""

    code = "nothing_committed"


class ForeignRootError(UsageError):
    """The root exists and holds something that is not a checkpoint root; nothing was touched."""

    code = "foreign_root"


class BusyError(CheckpointError):
    """Somebody else holds what is needed; waiting may help."""

    code = "busy"
    retryable = True


class RootLockedError(BusyError):
    """Another run writes to this root (a root has one writer at a time)."""

    code = "root_locked"


class SaveSkippedError(BusyError):
    """The save was dropped because every staging slot was taken; the step does not exist."""

    code = "save_skipped"


class SaveSupersededError(BusyError):
    """A newer save took this one's place before it was staged; the step does not exist."""

    code = "save_superseded"
    retryable = False


class SaveCancelledError(CheckpointError, CancelledError):
    """The caller cancelled the save before the writer had it; the step does not exist.

    An ordinary ``Exception`` on purpose: an ``asyncio.CancelledError`` would read as the
    cancellation of the task that awaits the save.
    """

    code = "save_cancelled"


class StorageError(CheckpointError, OSError):
    """The storage refused: full, read-only, unreachable, failing. ``errno`` is kept."""

    code = "storage"
    retryable = True

    def __init__(self, message: str, /, *, errno: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.errno = errno
        if errno is not None:
            self.fields["errno"] = errno
            self.strerror = os.strerror(errno)

    @classmethod
    def from_os_error(cls, error: OSError, doing: str, **fields: Any) -> StorageError:
        """Wrap *error*, met while *doing* ("write state/model/w"), keeping its errno."""
        if isinstance(error, cls):
            return error
        return cls(f"could not {doing}: {error}", errno=error.errno, **fields)


class WriterError(CheckpointError):
    """The background writer failed in a way that is not the storage's fault."""

    code = "writer"


class WriterDiedError(WriterError):
    """The writer ended without acknowledging the save, and no restart could finish it."""

    code = "writer_died"
    retryable = True


class StagingError(CheckpointError):
    """The snapshot could not be copied: the device reported an error."""

    code = "staging"


class StagingMemoryError(StagingError, MemoryError):
    """The system or the device refused the memory that a snapshot needs."""

    code = "staging_memory"
    retryable = True


class SnapshotMutatedError(CheckpointError):
    """A tensor was changed in place while it was being copied; the snapshot was not written."""

    code = "snapshot_mutated"


class CorruptError(CheckpointError):
    """Stored bytes are not what was written, or not what may be used."""

    code = "corrupt"


class CorruptCheckpointError(CorruptError):
    """A committed step is damaged; ``fields["damaged"]`` lists the files (and why) when known."""

    code = "corrupt_checkpoint"


class NonFiniteError(CorruptError):
    """A committed step is whole but holds NaN or infinity, and ``restore(finite=True)`` was asked for others."""

    code = "non_finite"


class UnsupportedFormatError(CorruptError):
    """The header's ``format`` is newer than this package reads, or is not ours."""

    code = "unsupported_format"


_BY_CODE["error"] = CheckpointError


def error_to_fields(error: BaseException) -> Fields:
    """``{"code", "message", "fields"}`` of *error*, JSON values only; the inverse of `error_from_fields`.

    A foreign exception becomes a `StorageError` when it is an ``OSError``, else a `WriterError`
    that names the original type.
    """
    if isinstance(error, CheckpointError):
        return {"code": error.code, "message": error.message, "fields": dict(error.fields)}
    if isinstance(error, OSError):
        return error_to_fields(StorageError(str(error), errno=error.errno))
    return error_to_fields(WriterError(f"{type(error).__name__}: {error}"))


def error_from_fields(payload: Fields) -> CheckpointError:
    """Rebuild the error that `error_to_fields` described; an unknown code gives `CheckpointError`."""
    cls = _BY_CODE.get(payload["code"], CheckpointError)
    return cls(payload["message"], **payload["fields"])
