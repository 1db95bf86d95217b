"""What a place that holds checkpoints must do. The docstrings here are the specification.

A store maps keys to immutable byte strings. Keys are relative, ``/``-separated, and have no
empty, ``.`` or ``..`` part; ``""`` names the root. Rules every store obeys:

* **Write once.** `Store.put` and `Store.create` never replace a key: a second write to the same
  key fails (`StorageError`, errno ``EEXIST``). There is no read-modify-write.
* **Visibility is not atomic.** A reader may see a key that is still being written. Atomicity is
  the commit's business (`repository.commit`), not the store's.
* **Durability is explicit.** Nothing is durable when `put` or `FileSink.close` return, unless
  asked for. `Barrier.wait` makes everything written below a prefix since the barrier was opened
  durable, `put(durable=True)` the contents of one key, `sync_directory` the names in one directory.
* **Failures of durability are final.** After any durability call failed, the caller must not call
  it again for the same keys and believe the answer (Linux reports a write-back error once and
  drops the dirty pages); what was written is written anew under another prefix.
* **Errors.** Whatever the operating system or the network refuses is a `StorageError` with
  ``errno`` and ``fields["key"]``; a malformed key is an `InvalidOptionError`. Nothing is retried here.
* **Threads.** Every method may be called from any thread. One `FileSink` belongs to one thread
  at a time.
* **Reads follow no link.** A key with a symbolic link in any part is refused (`StorageError`, errno
  ``ELOOP``), also by `Store.delete` unless it is the last part, which is then removed itself. A FIFO, socket
  or device is refused, never read and never blocked on. Hard links look like any file: only digests tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Barrier", "Entry", "FileSink", "Store", "StoreProperties"]


@dataclass(frozen=True, slots=True)
class StoreProperties:
    """What a store can do beyond the contract, as data.

    Attributes:
        atomic_create: of several concurrent writers of one key exactly one succeeds.
        hard_links: `Store.link` gives a second name to the same bytes.
        rename: `Store.rename` moves a whole directory in one atomic step.
    """

    atomic_create: bool
    hard_links: bool
    rename: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One name directly below a prefix.

    Attributes:
        name: the last part of the key.
        is_directory: whether keys exist (or may exist) below it.
        bytes: size of the file; 0 for anything that is not a regular file.
        is_special: neither a directory nor a regular file (symbolic link, FIFO, device, socket):
            never written by this package, never followed, never read.
    """

    name: str
    is_directory: bool
    bytes: int = 0
    is_special: bool = False


class FileSink(Protocol):
    """One file being written, front to back.

    Leaving it as a context manager closes it, or aborts it when an exception passes; who inherits from
    this class has that.
    """

    __slots__ = ()

    @property
    def room_bytes(self) -> int:
        """How many bytes `write` takes at present without waiting for the storage; 0 when it may always wait."""
        return 0

    def write(self, buffer: Buffer, /) -> None:
        """Append *buffer* (C-contiguous); it may be reused as soon as this returns.

        Raises:
            StorageError: the write failed; only `abort` makes sense afterwards.
        """

    def close(self) -> None:
        """Hand the last byte to the store; a second call does nothing. See the module for durability.

        Raises:
            StorageError: as `write`; the descriptor is released all the same.
        """

    def abort(self) -> None:
        """Give the file up and remove it as far as possible. Never raises; a no-op after `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


class Barrier(Protocol):
    """Makes everything below one prefix durable, once."""

    def wait(self) -> None:
        """Return when all files and directories created below the prefix since it was opened are durable.

        All sinks must be closed before. May be called once.

        Raises:
            StorageError: something may not be durable, including write-back errors that happened
                earlier, at any time since the barrier was opened.
        """

    def close(self) -> None:
        """Release what the barrier holds. Never raises; a second call does nothing."""


class Store(Protocol):
    """A flat, write-once namespace of files; see the module docstring for the common rules."""

    @property
    def url(self) -> str:
        """Where the store is, as a URL without trailing slash (``file:///data/run``)."""

    @property
    def properties(self) -> StoreProperties:
        """What this store can do."""

    def location(self, key: str) -> str:
        """What a person would call *key*: the absolute path of a local file, else a URL."""

    def put(self, key: str, data: Buffer, *, durable: bool = False) -> None:
        """Create *key* with *data*; parent directories appear as needed.

        Args:
            durable: return only when the contents would survive a power cut. Its *name* is durable
                after `sync_directory` of the parent (object stores: at once).

        Raises:
            StorageError: ``EEXIST`` when the key exists, else what went wrong; a partial file may remain.
        """

    def create(self, key: str, size_hint: int = 0) -> FileSink:
        """Start *key*; parent directories appear as needed.

        Args:
            size_hint: expected size in bytes; only chooses how the file is written.

        Raises:
            StorageError: as `put`.
        """

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes ``offset`` to ``offset + length`` of *key*; fewer when the file ends before.

        Raises:
            StorageError: ``ENOENT`` when there is no such file.
        """

    def read_into(self, key: str, out: memoryview, offset: int = 0, *, cache: bool = True) -> int:
        """Fill *out* (writable, C-contiguous) from *key*, starting at *offset*.

        Args:
            cache: ``False`` says that these bytes will not be read again soon; a store may then
                keep them out of its cache.

        Returns:
            How many bytes were read; less than ``len(out)`` only when the file ends.

        Raises:
            StorageError: ``ENOENT`` when there is no such file.
        """

    def entries(self, prefix: str) -> list[Entry]:
        """What lies directly below *prefix*, sorted by name; nothing when there is no such directory.

        A name that is created or deleted meanwhile may or may not appear.
        """

    def delete(self, prefix: str) -> None:
        """Remove the file *prefix*, or the directory and all below it, in no particular order.

        Idempotent: what is missing already is no error. Links are removed, never followed.

        Raises:
            InvalidOptionError: *prefix* is the root.
            StorageError: something is still there.
        """

    def open_barrier(self, prefix: str) -> Barrier:
        """Create the directory *prefix* if needed and watch it; opened *before* the first write below it."""

    def sync_directory(self, prefix: str) -> None:
        """Return when the names in the directory *prefix* (not what lies below them) are durable."""

    def rename(self, source: str, target: str) -> None:
        """Move the directory *source* to *target* in one atomic step (``properties.rename``).

        Raises:
            StorageError: ``EEXIST`` or ``ENOTEMPTY`` when *target* exists and holds anything;
                it is never replaced.
        """

    def link(self, source: str, target: str) -> None:
        """Give the file *source* the second name *target* (``properties.hard_links``); parents appear as needed.

        Raises:
            StorageError: ``EEXIST`` when *target* exists; ``EMLINK``, ``EXDEV`` or ``EPERM`` when
                this file cannot be linked, and must be written instead.
        """
