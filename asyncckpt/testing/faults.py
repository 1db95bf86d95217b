"""What shall go wrong at which call of a store: plain values, decided before anything runs."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Literal, Self

from asyncckpt.errors import InvalidOptionError, StorageError

__all__ = ["CALLS", "HALVED", "Call", "Fault", "Gate", "Moment", "SimulatedCrash"]

Moment = Literal["before", "halfway", "after"]

CALLS = (
    *("put", "create", "read", "read_into", "entries", "delete", "rename", "link", "open_barrier", "sync_directory"),
    *("write", "close", "abort"),  # of the sinks that `create` returned
    *("wait", "close_barrier"),  # of the barriers that `open_barrier` returned
)
"""Names of everything that counts as a call of a store."""

HALVED = ("put", "write", "delete")
"""The calls that leave something else than before and after when they are interrupted."""


class SimulatedCrash(BaseException):
    """Stands for the death of the process: not an ``Exception``, so that no handler goes on as if nothing was."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a store, or of a sink or barrier that it returned.

    Attributes:
        name: one of `CALLS`.
        key: the key or prefix it is about; the source of ``rename`` and ``link``.
        target: the other key of ``rename`` and ``link``.
    """

    name: str
    key: str
    target: str | None = None

    def __str__(self) -> str:
        arguments = repr(self.key) if self.target is None else f"{self.key!r}, {self.target!r}"
        return f"{self.name}({arguments})"


class Gate:
    """A place where a call waits until the test says so. Leaving it as a context manager opens it."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __repr__(self) -> str:
        return f"Gate(reached={self._reached.is_set()}, open={self._opened.is_set()})"

    def wait_reached(self, timeout: float | None = None) -> bool:
        """Return when a call waits here, or has passed; ``False`` when none did within *timeout* seconds."""
        return self._reached.wait(timeout)

    def open(self) -> None:
        """Let every call pass, now and later."""
        self._opened.set()

    def pass_through(self) -> None:
        """What the call does: report that it is here, and wait."""
        self._reached.set()
        self._opened.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. Exactly one of *error*, *crash* and *gate* says what.

    Attributes:
        call: which calls count, by name (see `CALLS`), as a shell pattern.
        key: which calls count, by key (``rename`` and ``link``: by either key), as a shell pattern;
            ``*`` also stands for ``/``.
        nth: which of the calls that count, from 1, fails.
        error: an errno, raised as a `StorageError` that names the key, or an exception, raised as it is.
        crash: the process dies: `SimulatedCrash` here and at every later call.
        gate: the call waits at this gate, then goes on.
        moment: ``"before"`` anything is done; ``"after"`` everything is done, and only the answer is
            lost; ``"halfway"``: half of the bytes of ``put`` and ``write`` are stored, half of the files
            below the prefix of ``delete`` are gone, those nearest to the prefix last; for other calls
            the same as before.
        persistent: all later calls that count fail as well.

    Raises:
        InvalidOptionError: a value outside of these.
    """

    call: str = "*"
    key: str = "*"
    nth: int = 1
    error: int | BaseException | None = None
    crash: bool = False
    gate: Gate | None = None
    moment: Moment = "before"
    persistent: bool = False

    def __post_init__(self) -> None:
        if not any(fnmatchcase(name, self.call) for name in CALLS):
            raise InvalidOptionError(f"Fault.call {self.call!r} is no call of a store: {', '.join(CALLS)}")
        if self.nth < 1:
            raise InvalidOptionError(f"Fault.nth counts from 1, it cannot be {self.nth}")
        if self.moment not in ("before", "halfway", "after"):
            raise InvalidOptionError(f"Fault.moment must be 'before', 'halfway' or 'after', not {self.moment!r}")
        if (self.error is not None) + self.crash + (self.gate is not None) != 1:
            raise InvalidOptionError("a Fault needs exactly one of error, crash and gate")

    def is_about(self, call: Call) -> bool:
        """Whether *call* counts."""
        keys = [call.key] if call.target is None else [call.key, call.target]
        return fnmatchcase(call.name, self.call) and any(fnmatchcase(key, self.key) for key in keys)

    def error_of(self, call: Call) -> BaseException:
        """What *call* raises."""
        if self.crash:
            return SimulatedCrash(f"crashed {self.moment} {call}")
        if isinstance(self.error, int):
            reason = f"{os.strerror(self.error)} (injected {self.moment} it)"
            return StorageError(f"could not {call.name} {call.key}: {reason}", errno=self.error, key=call.key)
        assert self.error is not None
        return self.error
