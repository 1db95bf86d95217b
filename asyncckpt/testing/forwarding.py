"""What a decorator around a store does unless it does something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt.stores.contract import Barrier, Entry, FileSink, Store, StoreProperties

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ForwardingStore"]


class ForwardingStore:
    """Passes every call on to *inner*; see `contract.Store`."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def properties(self) -> StoreProperties:
        return self.inner.properties

    def location(self, key: str) -> str:
        return self.inner.location(key)

    def put(self, key: str, data: Buffer, *, durable: bool = False) -> None:
        self.inner.put(key, data, durable=durable)

    def create(self, key: str, size_hint: int = 0) -> FileSink:
        return self.inner.create(key, size_hint)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.read(key, offset, length)

    def read_into(self, key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        return self.inner.read_into(key, out, offset, cache=cache)

    def entries(self, prefix: str) -> list[Entry]:
        return self.inner.entries(prefix)

    def delete(self, prefix: str) -> None:
        self.inner.delete(prefix)

    def open_barrier(self, prefix: str) -> Barrier:
        return self.inner.open_barrier(prefix)

    def sync_directory(self, prefix: str) -> None:
        self.inner.sync_directory(prefix)

    def rename(self, source: str, target: str) -> None:
        self.inner.rename(source, target)

    def link(self, source: str, target: str) -> None:
        self.inner.link(source, target)
