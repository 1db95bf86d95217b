"""Who calls what, and which fault is due: the part of a `FaultStore` that its sinks and barriers share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from asyncckpt.testing.faults import Call, Fault, SimulatedCrash

__all__ = ["Script"]

_T = TypeVar("_T")


class Script:
    """Runs calls one by one, each through at most one fault.

    Thread-safe. State: all of it is guarded by ``_lock``; operations run without it.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._lock = threading.Lock()
        self._counts: list[tuple[Fault, int]] = [(fault, 0) for fault in faults]
        self._calls: list[Call] = []
        self._crash: SimulatedCrash | None = None

    @property
    def calls(self) -> list[Call]:
        with self._lock:
            return list(self._calls)

    @property
    def is_crashed(self) -> bool:
        with self._lock:
            return self._crash is not None

    def inject(self, fault: Fault) -> None:
        with self._lock:
            self._counts.append((fault, 0))

    def run(
        self,
        call: Call,
        operation: Callable[[], _T],
        *,
        half: Callable[[], object] | None = None,
        lost: Callable[[_T], object] = lambda _: None,
    ) -> _T:
        """Do *operation*, unless a fault is due.

        Args:
            call: what it is.
            operation: does it.
            half: does a part of it; ``None`` when it has no parts.
            lost: ends what the operation returned, when the answer gets lost.

        Raises:
            SimulatedCrash: the process died here or before.
            BaseException: what the operation or the fault raises.
        """
        fault = self._arrive(call)
        if fault is None:
            return operation()
        if fault.gate is not None:
            return self._wait(fault, operation)
        # A crash is a crash, also when what came before it failed.
        with contextlib.suppress(Exception) if fault.crash else contextlib.nullcontext():
            if fault.moment == "after":
                lost(operation())
            elif fault.moment == "halfway" and half is not None:
                half()
        raise self._failure(fault, call)

    def run_quietly(self, call: Call, operation: Callable[[], None]) -> None:
        """`run` something that never raises: an error of a fault is swallowed, a crash is not."""
        with contextlib.suppress(Exception):
            self.run(call, operation)

    def _wait(self, fault: Fault, operation: Callable[[], _T]) -> _T:
        assert fault.gate is not None
        if fault.moment == "after":
            result = operation()
            fault.gate.pass_through()
            return result
        fault.gate.pass_through()
        with self._lock:
            self._require_alive()  # another thread may have met a crash meanwhile
        return operation()

    def _arrive(self, call: Call) -> Fault | None:
        """Record *call* and count it; the first fault that is due, if any."""
        due: list[Fault] = []
        with self._lock:
            self._require_alive()
            self._calls.append(call)
            for position, (fault, count) in enumerate(self._counts):
                if fault.is_about(call):
                    self._counts[position] = (fault, count + 1)
                    if count + 1 == fault.nth or (fault.persistent and count + 1 > fault.nth):
                        due.append(fault)
        return due[0] if due else None

    def _require_alive(self) -> None:
        if self._crash is not None:
            raise SimulatedCrash(f"the process is dead: {self._crash}")

    def _failure(self, fault: Fault, call: Call) -> BaseException:
        error = fault.error_of(call)
        if isinstance(error, SimulatedCrash):
            with self._lock:
                self._crash = self._crash or error
        return error
