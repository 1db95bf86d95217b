"""A disk as it is found after a crash: inodes and names. Two names may lead to one directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from crashstates.history import TOP

__all__ = ["Content", "Image"]


class Content:
    """The bytes of one file; immutable, so that images share them."""

    __slots__ = ("data", "digest")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.digest = xxhash.xxh3_128_hexdigest(data)


@dataclass(slots=True)
class Image:
    """Inodes and names.

    Attributes:
        directories: names and inodes of each directory.
        files: contents of each file.
    """

    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {TOP: {}})
    files: dict[int, Content] = field(default_factory=dict)

    def copy(self) -> Image:
        return Image({inode: dict(names) for inode, names in self.directories.items()}, dict(self.files))

    def find(self, path: str) -> int | None:
        """The inode at *path* (relative to the top), ``None`` when there is no such name."""
        inode = TOP
        for part in filter(None, path.split("/")):
            below = self.directories.get(inode, {}).get(part)
            if below is None:
                return None
            inode = below
        return inode

    def tree(self, inode: int) -> dict[str, Content]:
        """Every file below the directory *inode* by its relative path."""
        found: dict[str, Content] = {}
        for name, below in self.directories.get(inode, {}).items():
            if below in self.directories:
                found |= {f"{name}/{key}": content for key, content in self.tree(below).items()}
            else:
                found[name] = self.files[below]
        return found

    def digests(self) -> dict[int, str]:
        """A digest of everything below each directory that can be reached from the top."""
        found: dict[int, str] = {}
        self._digest(TOP, found)
        return found

    def _digest(self, inode: int, found: dict[int, str]) -> str:
        if inode not in self.directories:
            return self.files[inode].digest
        parts = [f"{name} {self._digest(below, found)}" for name, below in sorted(self.directories[inode].items())]
        found[inode] = hashlib.blake2b("\n".join(parts).encode() + b"/", digest_size=16).hexdigest()
        return found[inode]

    def identity(self) -> str:
        """What two images share only if they are the same to every reader and every deletion."""
        return "\n".join([self.digests()[TOP], *sorted(self._aliases())])

    def has_aliases(self) -> bool:
        """Whether a directory has two names."""
        return any(True for _ in self._aliases())

    def _aliases(self) -> Iterator[str]:
        seen: dict[int, str] = {}
        waiting = [(TOP, "")]
        while waiting:
            inode, path = waiting.pop()
            if inode in seen:
                yield " = ".join(sorted((seen[inode], path)))
                continue
            seen[inode] = path
            names = self.directories[inode]
            waiting += [(below, f"{path}/{name}") for name, below in names.items() if below in self.directories]

    def write_to(self, directory: Path) -> None:
        """Build the image on a real file system; a second name of a directory becomes a copy."""
        self._write(TOP, directory)

    def _write(self, inode: int, path: Path) -> None:
        if inode in self.files:
            path.write_bytes(self.files[inode].data)
            return
        path.mkdir()
        for name, below in self.directories[inode].items():
            self._write(below, path / name)
