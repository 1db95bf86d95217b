"""What a `FaultStore` hands out: sinks and barriers whose calls meet faults as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from asyncckpt.errors import StorageError
from asyncckpt.stores.contract import Barrier, FileSink
from asyncckpt.testing.faults import Call
from asyncckpt.testing.script import Script

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FaultBarrier", "FaultSink", "first_half"]


class FaultSink(FileSink):
    """See `contract.FileSink`. A failure is final, also one that *inner* knows nothing of.

    Args:
        script: which faults are due.
        key: of the file.
        inner: the sink that writes it.
    """

    def __init__(self, script: Script, key: str, inner: FileSink) -> None:
        self._script = script
        self._key = key
        self._inner = inner
        self._error: StorageError | None = None  # the first failure; forgotten when the sink has ended

    def __repr__(self) -> str:
        return f"FaultSink({self._inner!r})"

    def write(self, buffer: Buffer, /) -> None:
        try:
            self._script.run(
                Call("write", self._key),
                lambda: self._unless_failed(lambda: self._inner.write(buffer)),
                half=lambda: self._unless_failed(lambda: self._inner.write(first_half(buffer))),
            )
        except StorageError as error:
            self._error = self._error or error
            raise

    def close(self) -> None:
        try:
            self._script.run(Call("close", self._key), lambda: self._unless_failed(self._inner.close))
        except StorageError:
            self.release()  # whatever happened, the descriptor is given back
            raise

    def abort(self) -> None:
        self._script.run_quietly(Call("abort", self._key), self.release)

    def release(self) -> None:
        """Abort the inner sink; no call of the store."""
        self._error = None
        self._inner.abort()

    def _unless_failed(self, operation: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        operation()


class FaultBarrier:
    """See `contract.Barrier`.

    Args:
        script: which faults are due.
        prefix: what it watches.
        inner: the barrier that does so.
    """

    def __init__(self, script: Script, prefix: str, inner: Barrier) -> None:
        self._script = script
        self._prefix = prefix
        self._inner = inner

    def __repr__(self) -> str:
        return f"FaultBarrier({self._inner!r})"

    def wait(self) -> None:
        self._script.run(Call("wait", self._prefix), self._inner.wait)

    def close(self) -> None:
        self._script.run_quietly(Call("close_barrier", self._prefix), self._inner.close)

    def release(self) -> None:
        """Close the inner barrier; no call of the store."""
        self._inner.close()


def first_half(buffer: Buffer) -> memoryview:
    """The first half of the bytes of *buffer*, which is C-contiguous."""
    view = memoryview(buffer)
    return view.cast("B")[: view.nbytes // 2] if view.nbytes else memoryview(b"")
