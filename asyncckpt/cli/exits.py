"""Exit codes, and which error ends with which."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from asyncckpt.cli.output import print_json, printable
from asyncckpt.errors import CheckpointError, CorruptError, NothingCommittedError, UsageError, error_to_fields

__all__ = ["ExitCode", "exit_on_error"]


class ExitCode(IntEnum):
    """What the process tells its caller; scripts may rely on these."""

    OK = 0
    ERROR = 1
    USAGE = 2
    CORRUPT = 3
    EMPTY = 4


def code_of(error: BaseException) -> ExitCode:
    """The exit code that *error* ends with."""
    if isinstance(error, NothingCommittedError):
        return ExitCode.EMPTY
    if isinstance(error, CorruptError):
        return ExitCode.CORRUPT
    if isinstance(error, UsageError):
        return ExitCode.USAGE
    return ExitCode.ERROR


@contextmanager
def exit_on_error(*, as_json: bool) -> Iterator[None]:
    """Turn errors of the block into a message on stderr (JSON on stdout too, if asked) and an exit code."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (CheckpointError, OSError) as error:
        sys.stderr.write(printable(f"asyncckpt: {error}") + "\n")
        if as_json:
            print_json({"error": error_to_fields(error)})
        sys.exit(code_of(error))
