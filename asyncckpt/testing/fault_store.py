"""A store that fails where it is told to, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from asyncckpt.stores.contract import Barrier, Entry, FileSink, Store
from asyncckpt.testing.fault_handles import FaultBarrier, FaultSink, first_half
from asyncckpt.testing.faults import Call, Fault
from asyncckpt.testing.forwarding import ForwardingStore
from asyncckpt.testing.script import Script

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FaultStore"]


class FaultStore(ForwardingStore):
    """A decorator around any store; without faults it obeys the contract as *inner* does.

    Every call of the store, and of the sinks and barriers it returns, is recorded and may meet a fault;
    ``url``, ``properties`` and ``location`` are no calls. Each fault counts for itself; when several are
    due at one call, the first in the list is met. `FileSink.abort` and `Barrier.close` never raise an
    error: one injected before them means that nothing was done and nobody heard of it.

    After a crash every call raises `SimulatedCrash`, does nothing and is not recorded: a dead process
    cleans nothing up. What it had open in the inner store stays open until `release`.

    All methods may be called from any thread.

    Args:
        inner: where everything is passed on to.
        faults: what goes wrong.
    """

    def __init__(self, inner: Store, faults: Iterable[Fault] = ()) -> None:
        super().__init__(inner)
        self._script = Script(faults)
        self._lock = threading.Lock()  # guards _handles
        self._handles: list[FaultSink | FaultBarrier] = []

    def __repr__(self) -> str:
        state = "crashed" if self.is_crashed else "alive"
        return f"FaultStore({self.inner!r}, {state}, calls={len(self.calls)})"

    # For the test

    @property
    def calls(self) -> list[Call]:
        """Every call so far, also those that failed, in the order they came in."""
        return self._script.calls

    @property
    def is_crashed(self) -> bool:
        """Whether the process that this store simulates is dead."""
        return self._script.is_crashed

    def inject(self, fault: Fault) -> None:
        """Add *fault*; it counts from here on."""
        self._script.inject(fault)

    def release(self) -> None:
        """Abort the sinks and close the barriers that are still open, as far as *inner* is concerned.

        Aborting removes files: call it when everything was checked, and no other thread uses the store.
        """
        with self._lock:
            handles, self._handles = self._handles, []
        for handle in handles:
            handle.release()

    # The store

    def put(self, key: str, data: Buffer, *, durable: bool = False) -> None:
        self._script.run(
            Call("put", key),
            lambda: self.inner.put(key, data, durable=durable),
            half=lambda: self.inner.put(key, first_half(data)),
        )

    def create(self, key: str, size_hint: int = 0) -> FileSink:
        sink = self._script.run(
            Call("create", key),
            lambda: self.inner.create(key, size_hint),
            lost=lambda sink: sink.close(),
        )
        handle = FaultSink(self._script, key, sink)
        self._remember(handle)
        return handle

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._script.run(Call("read", key), lambda: self.inner.read(key, offset, length))

    def read_into(self, key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        return self._script.run(Call("read_into", key), lambda: self.inner.read_into(key, out, offset, cache=cache))

    def entries(self, prefix: str) -> list[Entry]:
        return self._script.run(Call("entries", prefix), lambda: self.inner.entries(prefix))

    def delete(self, prefix: str) -> None:
        self._script.run(
            Call("delete", prefix), lambda: self.inner.delete(prefix), half=lambda: self._delete_half(prefix)
        )

    def open_barrier(self, prefix: str) -> Barrier:
        barrier = self._script.run(
            Call("open_barrier", prefix),
            lambda: self.inner.open_barrier(prefix),
            lost=lambda barrier: barrier.close(),
        )
        handle = FaultBarrier(self._script, prefix, barrier)
        self._remember(handle)
        return handle

    def sync_directory(self, prefix: str) -> None:
        self._script.run(Call("sync_directory", prefix), lambda: self.inner.sync_directory(prefix))

    def rename(self, source: str, target: str) -> None:
        self._script.run(Call("rename", source, target), lambda: self.inner.rename(source, target))

    def link(self, source: str, target: str) -> None:
        self._script.run(Call("link", source, target), lambda: self.inner.link(source, target))

    def _remember(self, handle: FaultSink | FaultBarrier) -> None:
        with self._lock:
            self._handles.append(handle)

    def _delete_half(self, prefix: str) -> None:
        # Deepest first, as `rm -r` goes: a file that marks its directory as complete is among the last.
        files = sorted(self._files_below(prefix), key=lambda key: (-key.count("/"), key))
        for key in files[: len(files) // 2]:
            self.inner.delete(key)

    def _files_below(self, prefix: str) -> Iterator[str]:
        parent, _, name = prefix.rpartition("/")
        if any(entry.name == name and entry.is_directory for entry in self.inner.entries(parent)):
            yield from self._walk(prefix)

    def _walk(self, directory: str) -> Iterator[str]:
        for entry in self.inner.entries(directory):
            key = f"{directory}/{entry.name}"
            if entry.is_directory:
                yield from self._walk(key)
            else:
                yield key
