"""The error tree: stable codes, and every error survives pickling and the writer's messages whole."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import json
import pickle

import pytest

from asyncckpt import errors
from asyncckpt.errors import (
    BusyError,
    CheckpointError,
    CorruptError,
    StorageError,
    UsageError,
    WriterError,
    error_from_fields,
    error_to_fields,
)

CODES = {
    "error": errors.CheckpointError,
    "usage": errors.UsageError,
    "closed": errors.ClosedError,
    "invalid_option": errors.InvalidOptionError,
    "unsupported_state": errors.UnsupportedStateError,
    "state_mismatch": errors.StateMismatchError,
    "step_exists": errors.StepExistsError,
    "not_found": errors.CheckpointNotFoundError,
    "nothing_committed": errors.NothingCommittedError,
    "foreign_root": errors.ForeignRootError,
    "graph_capture": errors.GraphCaptureError,
    "busy": errors.BusyError,
    "root_locked": errors.RootLockedError,
    "save_skipped": errors.SaveSkippedError,
    "save_superseded": errors.SaveSupersededError,
    "save_cancelled": errors.SaveCancelledError,
    "staging": errors.StagingError,
    "staging_memory": errors.StagingMemoryError,
    "storage": errors.StorageError,
    "writer": errors.WriterError,
    "writer_died": errors.WriterDiedError,
    "snapshot_mutated": errors.SnapshotMutatedError,
    "corrupt": errors.CorruptError,
    "corrupt_checkpoint": errors.CorruptCheckpointError,
    "non_finite": errors.NonFiniteError,
    "unsupported_format": errors.UnsupportedFormatError,
}
RETRYABLE = {"busy", "root_locked", "save_skipped", "staging_memory", "storage", "writer_died"}
FIELDS = {
    "step": 500,
    "key": "state/model/w",
    "damaged": [{"key": "a/c.0", "reason": "missing"}],
    "missing": ["x"],
    "nothing": None,
    "ratio": 0.5,
}

every_error = pytest.mark.parametrize("cls", CODES.values(), ids=CODES)


def subclasses(cls: type[CheckpointError]) -> set[type[CheckpointError]]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_codes_are_stable_and_unique() -> None:
    """Programs match on these; removing or renaming one is a breaking change."""
    assert {cls.code: cls for cls in subclasses(CheckpointError)} == CODES
    assert len(subclasses(CheckpointError)) == len(CODES)


def test_every_error_is_exported() -> None:
    assert {name for name in errors.__all__ if name.endswith("Error")} == {cls.__name__ for cls in CODES.values()}


def test_every_error_is_in_the_drawing() -> None:
    assert errors.__doc__ is not None
    for cls in CODES.values():
        assert f" {cls.__name__} " in errors.__doc__ or errors.__doc__.count(f"{cls.__name__}\n")


@every_error
def test_pickling_keeps_type_message_and_fields(cls: type[CheckpointError]) -> None:
    error = cls("it broke. Do this.", **FIELDS)
    for clone in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(clone) is cls
        assert str(clone) == "it broke. Do this."
        assert clone.fields == FIELDS
        assert clone.args == error.args


@every_error
def test_messages_keep_type_message_and_fields(cls: type[CheckpointError]) -> None:
    payload = json.loads(json.dumps(error_to_fields(cls("it broke", **FIELDS))))
    clone = error_from_fields(payload)
    assert type(clone) is cls
    assert clone.message == "it broke"
    assert clone.fields == FIELDS
    assert error_to_fields(clone) == payload


@every_error
def test_repr_shows_the_fields(cls: type[CheckpointError]) -> None:
    assert repr(cls("it broke", step=5)) == f"{cls.__name__}('it broke', step=5)"
    assert repr(cls("it broke")) == f"{cls.__name__}('it broke')"


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.InvalidOptionError, ValueError),
        (errors.UnsupportedStateError, TypeError),
        (errors.CheckpointNotFoundError, LookupError),
        (errors.StorageError, OSError),
        (errors.SaveCancelledError, concurrent.futures.CancelledError),
        (errors.RootLockedError, BusyError),
        (errors.SaveSkippedError, BusyError),
        (errors.SaveSupersededError, BusyError),
        (errors.WriterDiedError, WriterError),
        (errors.CorruptCheckpointError, CorruptError),
        (errors.UnsupportedFormatError, CorruptError),
        (errors.NonFiniteError, CorruptError),
        (errors.StepExistsError, UsageError),
    ],
)
def test_errors_are_caught_as_what_they_are(cls: type[CheckpointError], base: type[Exception]) -> None:
    with pytest.raises(base):
        raise cls("it broke")


@every_error
def test_retryable_errors(cls: type[CheckpointError]) -> None:
    assert cls.retryable == (cls.code in RETRYABLE)


def test_storage_error_keeps_errno_everywhere() -> None:
    error = StorageError("could not write x", errno=errno.ENOSPC, key="x")
    for clone in (error, pickle.loads(pickle.dumps(error)), error_from_fields(error_to_fields(error))):
        assert isinstance(clone, StorageError)
        assert clone.errno == errno.ENOSPC
        assert clone.strerror == "No space left on device"
        assert clone.fields == {"key": "x", "errno": errno.ENOSPC}
        assert str(clone) == "could not write x"


def test_storage_error_from_os_error() -> None:
    error = StorageError.from_os_error(OSError(errno.EIO, "Input/output error"), "read state/w", key="state/w")
    assert error.errno == errno.EIO
    assert error.fields == {"key": "state/w", "errno": errno.EIO}
    assert "could not read state/w" in str(error)
    assert StorageError.from_os_error(error, "restore") is error


def test_foreign_os_error_becomes_a_storage_error() -> None:
    clone = error_from_fields(error_to_fields(PermissionError(errno.EACCES, "Permission denied")))
    assert type(clone) is StorageError
    assert clone.errno == errno.EACCES


def test_foreign_error_becomes_a_writer_error_that_names_it() -> None:
    clone = error_from_fields(error_to_fields(ZeroDivisionError("by zero")))
    assert type(clone) is WriterError
    assert str(clone) == "ZeroDivisionError: by zero"


def test_unknown_code_of_a_newer_peer() -> None:
    clone = error_from_fields({"code": "from_the_future", "message": "it broke", "fields": {"step": 1}})
    assert type(clone) is CheckpointError
    assert clone.fields == {"step": 1}
