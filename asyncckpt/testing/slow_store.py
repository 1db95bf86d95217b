"""A store that takes its time, for tests of deadlines."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from asyncckpt.stores.contract import Barrier, FileSink, Store
from asyncckpt.testing.forwarding import ForwardingStore

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SlowStore"]


class SlowStore(ForwardingStore):
    """A decorator around any store that lets written bytes through at a limited rate; else it does what *inner* does.

    All threads share the rate, as they share a disk. Reading, listing and deleting are not slowed.

    Args:
        inner: where everything is passed on to.
        bytes_s: bytes written per second.
        latency_s: seconds that each `put`, `create` and barrier takes in addition.
    """

    def __init__(self, inner: Store, bytes_s: float, latency_s: float = 0.0) -> None:
        super().__init__(inner)
        self._bytes_s = bytes_s
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at = 0.0  # when what was let through so far is written; guarded by _lock

    def __repr__(self) -> str:
        return f"SlowStore({self.inner!r}, {self._bytes_s:g} bytes/s)"

    def take_time(self, num_bytes: int) -> None:
        """Sleep for as long as *num_bytes* take once everything before them is written."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self._bytes_s
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))

    # The store

    def put(self, key: str, data: Buffer, *, durable: bool = False) -> None:
        time.sleep(self._latency_s)
        self.take_time(memoryview(data).nbytes)
        super().put(key, data, durable=durable)

    def create(self, key: str, size_hint: int = 0) -> FileSink:
        time.sleep(self._latency_s)
        return _SlowSink(self, super().create(key, size_hint))

    def open_barrier(self, prefix: str) -> Barrier:
        time.sleep(self._latency_s)
        return super().open_barrier(prefix)


class _SlowSink(FileSink):
    def __init__(self, store: SlowStore, inner: FileSink) -> None:
        self._store = store
        self._inner = inner

    def write(self, buffer: Buffer, /) -> None:
        self._store.take_time(memoryview(buffer).nbytes)
        self._inner.write(buffer)

    def close(self) -> None:
        self._inner.close()

    def abort(self) -> None:
        self._inner.abort()
