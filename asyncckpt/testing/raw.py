"""Looking at what a store keeps, and changing it, behind the store's back."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol, runtime_checkable

__all__ = ["RawAccess", "RawDirectory", "RawFiles"]


class RawAccess(Protocol):
    """The place a store keeps its files in, without the store: as another process would see it."""

    def read(self, key: str) -> bytes:
        """All bytes of *key*.

        Raises:
            LookupError, OSError: there is no such key.
        """

    def write(self, key: str, data: bytes) -> None:
        """Create or replace *key*."""

    def names(self, prefix: str) -> list[str]:
        """Names directly below *prefix*, files and directories, in any order; none when there is nothing."""


@runtime_checkable
class RawFiles(RawAccess, Protocol):
    """What a place with a file system below it can do as well; the suite skips what needs it elsewhere."""

    def symlink(self, key: str, target: str) -> None:
        """Make *key* a symbolic link to the absolute path *target*."""

    def fifo(self, key: str) -> None:
        """Make *key* a FIFO."""

    def socket(self, key: str) -> None:
        """Make *key* a socket.

        Raises:
            PermissionError: not here; the test is skipped.
        """

    def is_same_file(self, key: str, other: str) -> bool:
        """Whether both keys are names of one file."""


class RawDirectory:
    """`RawFiles` of a local directory.

    Args:
        root: the directory that the store keeps its files in.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"RawDirectory({str(self.root)!r})"

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def names(self, prefix: str) -> list[str]:
        try:
            return os.listdir(self.root / prefix)
        except FileNotFoundError:
            return []

    def symlink(self, key: str, target: str) -> None:
        os.symlink(target, self.root / key)

    def fifo(self, key: str) -> None:
        os.mkfifo(self.root / key)

    def socket(self, key: str) -> None:
        # Not bind(2): its paths end at 107 bytes, which the temporary directories of tests exceed.
        os.mknod(self.root / key, stat.S_IFSOCK | 0o600)

    def is_same_file(self, key: str, other: str) -> bool:
        return os.path.samefile(self.root / key, self.root / other)
