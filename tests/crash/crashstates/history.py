"""What a traced program did to the file system, as changes and flushes of inodes. Pure.

The model is deliberately weaker than any real file system:

* fsync of a file makes its bytes and its size durable, *not* its name;
* fsync of a directory makes the names in it durable, not what they lead to;
* syncfs makes everything durable that returned before it was called;
* nothing else ever is, and what is not durable may be on the disk all the same, in any order;
* a rename inside one directory is atomic. Between two directories, the new name may be there without
  the old one being gone, and only an fsync of the old directory alone gives the opposite.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field

from crashstates.trace import Call, Descriptor

__all__ = ["TOP", "DataChange", "EntryChange", "History", "Mark", "replay"]

TOP = 0
"""Inode of the top directory; it exists, durable, from the beginning."""


@dataclass(slots=True)
class EntryChange:
    """One name in one directory.

    Attributes:
        unit: changes of one unit are atomic.
        inode: what the name leads to from now on; ``None`` removes the name.
        needs: a unit without which the file system does not persist this one by itself.
        durable_at: end of the first flush that covers it.
    """

    unit: int
    directory: int
    name: str
    inode: int | None
    start: int
    end: int
    needs: int | None = None
    durable_at: float = math.inf


@dataclass(slots=True)
class DataChange:
    """Bytes written to a file, or with *data* ``None`` a new size, which is then *offset*."""

    inode: int
    offset: int
    data: bytes | None
    start: int
    end: int
    durable_at: float = math.inf


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of the program that carries a promise, see `program`."""

    words: tuple[str, ...]
    start: int


@dataclass(slots=True)
class History:
    """Everything that happened, in the order in which it was issued.

    Attributes:
        directories: inodes that are directories; all others are files.
        moments: a crash is possible right after each.
        num_calls: modelled system calls.
    """

    directories: set[int] = field(default_factory=lambda: {TOP})
    entries: list[EntryChange] = field(default_factory=list)
    data: list[DataChange] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    moments: list[int] = field(default_factory=list)
    num_calls: int = 0


def replay(calls: Iterable[Call], top: str, marks: str) -> History:
    """The history of everything below the directory *top*; lines written to the file *marks* are marks."""
    replayed = _Replay(top, marks)
    moments = set()
    waiting: list[Call] = []
    for call in calls:
        # A call may have been issued before the one of another thread that made its directory.
        waiting = _apply_in_order(replayed, [*waiting, call], moments)
    if waiting:
        raise ValueError(f"the program did {waiting[0].name} where the model knows no such place: {waiting[0]}")
    replayed.history.moments = sorted(moments)
    return replayed.history


def _apply_in_order(replayed: _Replay, calls: list[Call], moments: set[int]) -> list[Call]:
    """Apply what can be applied; what is left needs something that no call has made yet."""
    left: list[Call] = []
    for call in calls:
        try:
            is_modelled = replayed.apply(call)
        except KeyError:
            left.append(call)
            continue
        if is_modelled:
            moments |= {call.start, call.end}
            replayed.history.num_calls += 1
    return left if len(left) in (0, len(calls)) else _apply_in_order(replayed, left, moments)


class _Replay:
    """Applies calls to the tree as the program saw it, and notes what each changed.

    State: ``_tree`` maps a directory to its names, ``_offsets`` an open descriptor to where the next
    plain write goes. Descriptor numbers are those of one process; its threads share them.
    """

    def __init__(self, top: str, marks: str) -> None:
        self.history = History()
        self._top = top
        self._marks = marks
        self._tree: dict[int, dict[str, int]] = {TOP: {}}
        self._offsets: dict[int, int] = {}
        self._num_inodes = 1
        self._num_units = 0

    def apply(self, call: Call) -> bool:
        """Whether *call* changed, flushed or marked anything."""
        match call.name, call.arguments:
            case "openat", (base, path, flags, *_):
                return self._open(call, _join(base, path), str(flags).split("|"))
            case "mkdir", (path, *_):
                return self._add(call, _join(None, path), self._new_inode(is_directory=True))
            case "mkdirat", (base, path, *_):
                return self._add(call, _join(base, path), self._new_inode(is_directory=True))
            case "write", (Descriptor(path=self._marks), data, *_):
                self.history.marks += [Mark(tuple(line.split()), call.start) for line in data.decode().splitlines()]
                return True
            case "write", (Descriptor(number=number) as file, data, *_):
                offset = self._offsets.get(number, 0)
                is_modelled = self._write(call, file, offset, data[: call.result])
                self._offsets[number] = offset + call.result
                return is_modelled
            case "pwrite64", (file, data, _, offset):
                return self._write(call, file, int(offset), data[: call.result])
            case "ftruncate", (file, size):
                return self._write(call, file, int(size), None)
            case (("fsync" | "fdatasync"), (Descriptor(path=path), *_)):
                return self._sync(call, path)
            case "syncfs", _:
                return self._flush(call, None)
            case "rename", (source, target):
                return self._rename(call, _join(None, source), _join(None, target))
            case (("renameat" | "renameat2"), (base, source, target_base, target, *_)):
                return self._rename(call, _join(base, source), _join(target_base, target))
            case "link", (source, target):
                return self._link(call, _join(None, source), _join(None, target))
            case "linkat", (base, source, target_base, target, *_):
                return self._link(call, _join(base, source), _join(target_base, target))
            case (("unlink" | "rmdir"), (path,)):
                return self._remove(call, _join(None, path))
            case "unlinkat", (base, path, *_):
                return self._remove(call, _join(base, path))
        raise ValueError(f"the model does not know {call.name} with {len(call.arguments)} arguments")

    def _new_inode(self, *, is_directory: bool) -> int:
        inode = self._num_inodes
        self._num_inodes += 1
        if is_directory:
            self._tree[inode] = {}
            self.history.directories.add(inode)
        return inode

    def _locate(self, path: str) -> tuple[int, str] | None:
        """Directory and name of *path*; ``None`` for what is not below the top."""
        if not path.startswith(f"{self._top}/"):
            return None
        *parents, name = path[len(self._top) + 1 :].split("/")
        directory = TOP
        for parent in parents:
            directory = self._tree[directory][parent]
        return directory, name

    def _inode(self, path: str) -> int | None:
        if path == self._top:
            return TOP
        place = self._locate(path)
        return None if place is None else self._tree[place[0]][place[1]]

    def _change(self, call: Call, unit: int, directory: int, name: str, inode: int | None, needs: int | None) -> None:
        if inode is None:
            del self._tree[directory][name]
        else:
            self._tree[directory][name] = inode
        self.history.entries.append(EntryChange(unit, directory, name, inode, call.start, call.end, needs))

    def _new_unit(self) -> int:
        self._num_units += 1
        return self._num_units

    def _add(self, call: Call, path: str, inode: int) -> bool:
        place = self._locate(path)
        if place is not None:
            self._change(call, self._new_unit(), *place, inode, None)
        return place is not None

    def _open(self, call: Call, path: str, flags: list[str]) -> bool:
        self._offsets[call.result] = 0
        place = self._locate(path)
        if place is None or ("O_CREAT" not in flags and "O_TRUNC" not in flags):
            return False
        directory, name = place
        if name not in self._tree[directory]:
            return self._add(call, path, self._new_inode(is_directory=False))
        if "O_TRUNC" in flags:
            self.history.data.append(DataChange(self._tree[directory][name], 0, None, call.start, call.end))
        return "O_TRUNC" in flags

    def _write(self, call: Call, file: Descriptor, offset: int, data: bytes | None) -> bool:
        inode = self._inode(file.path)
        if inode is not None:
            self.history.data.append(DataChange(inode, offset, data, call.start, call.end))
        return inode is not None

    def _link(self, call: Call, source: str, target: str) -> bool:
        inode = self._inode(source)
        return inode is not None and self._add(call, target, inode)

    def _remove(self, call: Call, path: str) -> bool:
        place = self._locate(path)
        if place is not None:
            self._change(call, self._new_unit(), *place, None, None)
        return place is not None

    def _rename(self, call: Call, source: str, target: str) -> bool:
        old, new, inode = self._locate(source), self._locate(target), self._inode(source)
        if old is None or new is None:
            return False
        unit = self._new_unit()
        self._change(call, unit, *new, inode, None)
        if old[0] == new[0]:
            self._change(call, unit, *old, None, None)
        else:
            self._change(call, self._new_unit(), *old, None, unit)
        return True

    def _sync(self, call: Call, path: str) -> bool:
        inode = self._inode(path)
        return inode is not None and self._flush(call, inode)

    def _flush(self, call: Call, inode: int | None) -> bool:
        """Everything of *inode* (of all, if ``None``) that returned before *call* is durable at its end."""
        for entry in self.history.entries:
            if entry.end < call.start and inode in (None, entry.directory):
                entry.durable_at = min(entry.durable_at, call.end)
        for data in self.history.data:
            if data.end < call.start and inode in (None, data.inode):
                data.durable_at = min(data.durable_at, call.end)
        return True


def _join(base: object, path: object) -> str:
    assert isinstance(path, bytes)
    name = path.decode("utf-8", "surrogateescape")
    return posixpath.normpath(posixpath.join(base.path, name) if isinstance(base, Descriptor) else name)
