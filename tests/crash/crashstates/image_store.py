"""The package's store contract on a crash image, in memory.

In memory, because a crash may leave two names for one directory, which no file system lets us build,
and because thousands of states are checked.
"""

from __future__ import annotations

import errno

from asyncckpt.errors import StorageError
from asyncckpt.stores.contract import Entry, StoreProperties
from crashstates.history import TOP
from crashstates.image import Content, Image

__all__ = ["ImageStore"]


class _Sink:
    def __init__(self, store: ImageStore, key: str) -> None:
        self._store, self._key, self._parts = store, key, [b""]

    def write(self, buffer: bytes, /) -> None:
        self._parts.append(bytes(buffer))

    def close(self) -> None:
        self._store.image.files[self._store.require(self._key)] = Content(b"".join(self._parts))

    def abort(self) -> None:
        self._store.delete(self._key)

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.abort()


class _NoBarrier:
    def wait(self) -> None: ...
    def close(self) -> None: ...


class ImageStore:
    """`contract.Store` on the directory *root* of an image, which it changes."""

    properties = StoreProperties(atomic_create=True, hard_links=False, rename=True)

    def __init__(self, image: Image, root: str) -> None:
        self.image = image
        self.url = f"image:///{root}"
        self._root = root
        self._next_inode = max([*image.directories, *image.files]) + 1

    def location(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _split(self, key: str) -> tuple[str, str]:
        parent, _, name = f"{self._root}/{key}".rpartition("/")
        return parent, name

    def require(self, key: str) -> int:
        inode = self.image.find(f"{self._root}/{key}")
        if inode is None:
            raise StorageError(f"there is no {key}", errno=errno.ENOENT, key=key)
        return inode

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        inode = self.require(key)
        if inode in self.image.directories:
            raise StorageError(f"{key} is a directory", errno=errno.EINVAL, key=key)
        return self.image.files[inode].data[offset : None if length is None else offset + length]

    def read_into(self, key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        data = self.read(key, offset, len(out))
        out[: len(data)] = data
        return len(data)

    def entries(self, prefix: str) -> list[Entry]:
        inode = self.image.find(f"{self._root}/{prefix}")
        names = {} if inode is None else self.image.directories.get(inode, {})
        return [self._entry(name, below) for name, below in sorted(names.items())]

    def _entry(self, name: str, inode: int) -> Entry:
        if inode in self.image.directories:
            return Entry(name, is_directory=True)
        return Entry(name, is_directory=False, bytes=len(self.image.files[inode].data))

    def _make_directory(self, path: str) -> int:
        inode = TOP
        for part in path.split("/"):
            names = self.image.directories[inode]
            if part not in names:
                names[part] = self._new_inode()
                self.image.directories[names[part]] = {}
            inode = names[part]
        return inode

    def _new_inode(self) -> int:
        self._next_inode += 1
        return self._next_inode

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        with self.create(key) as sink:
            sink.write(data)

    def create(self, key: str, size_hint: int = 0) -> _Sink:
        parent, name = self._split(key)
        names = self.image.directories[self._make_directory(parent)]
        if name in names:
            raise StorageError(f"{key} exists", errno=errno.EEXIST, key=key)
        names[name] = self._new_inode()
        self.image.files[names[name]] = Content(b"")
        return _Sink(self, key)

    def delete(self, prefix: str) -> None:
        parent, name = self._split(prefix)
        directory = self.image.find(parent)
        if directory is None or name not in self.image.directories[directory]:
            return
        # As a real deletion: what is below goes first, whatever other names lead to it.
        for entry in self.entries(prefix):
            self.delete(f"{prefix}/{entry.name}")
        del self.image.directories[directory][name]

    def open_barrier(self, prefix: str) -> _NoBarrier:
        self._make_directory(f"{self._root}/{prefix}")
        return _NoBarrier()

    def sync_directory(self, prefix: str) -> None:
        self.require(prefix)

    def rename(self, source: str, target: str) -> None:
        inode = self.require(source)
        parent, name = self._split(target)
        names = self.image.directories[self._make_directory(parent)]
        if name in names and self.entries(target):
            raise StorageError(f"{target} exists", errno=errno.ENOTEMPTY, key=target)
        names[name] = inode
        old_parent, old_name = self._split(source)
        del self.image.directories[self.image.find(old_parent) or TOP][old_name]

    def link(self, source: str, target: str) -> None:
        raise StorageError("an image has no links", errno=errno.EPERM, key=target)
