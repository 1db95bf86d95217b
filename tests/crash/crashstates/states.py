"""The crash states of a history: at every moment, every way to lose what was not flushed. Pure.

At one moment the *pending* items are the changes of names and the files with written bytes that no flush
covers yet. A state says which names persisted and what became of each file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from crashstates.history import TOP, DataChange, EntryChange, History
from crashstates.image import Content, Image

__all__ = ["Choice", "Disk", "choices"]

SECTOR = 512
PAGE = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """One crash state.

    Attributes:
        moment: right after which the power failed.
        units: changes of names that persisted although nothing had made them durable.
        files: for files with pending bytes, the index of their variant; others keep only what is durable.
    """

    moment: int
    units: frozenset[int] = frozenset()
    files: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Moment:
    """What may or may not be on the disk at one moment; only of what some name may lead to.

    Attributes:
        directories: that can be reached in some state.
        entries: changes of the names in them, in order.
        units: ids of those of these changes that are pending.
        contents: the variants of each file, see `Disk.variants`.
    """

    directories: frozenset[int]
    entries: tuple[EntryChange, ...]
    units: tuple[int, ...]
    contents: dict[int, tuple[Content, ...]]

    @property
    def pending_files(self) -> dict[int, int]:
        """Number of variants of each file that has more than one."""
        return {inode: len(variants) for inode, variants in self.contents.items() if len(variants) > 1}


class Disk:
    """Builds images of one history."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._writes: dict[int, list[DataChange]] = {}
        for change in history.data:
            self._writes.setdefault(change.inode, []).append(change)
        self._needs = {entry.unit: entry.needs for entry in history.entries if entry.needs is not None}
        self._variants = lru_cache(maxsize=None)(_variants)
        self.at = lru_cache(maxsize=None)(self._at)

    def _at(self, moment: int) -> Moment:
        issued = [entry for entry in self.history.entries if entry.start <= moment]
        reachable = _reachable(issued, moment)
        entries = tuple(entry for entry in issued if entry.directory in reachable)
        return Moment(
            directories=frozenset(reachable & self.history.directories),
            entries=entries,
            units=tuple(dict.fromkeys(entry.unit for entry in entries if entry.durable_at > moment)),
            contents={inode: self.variants(inode, moment) for inode in reachable - self.history.directories},
        )

    def variants(self, inode: int, moment: int) -> tuple[Content, ...]:
        """What may be found in a file: first only what is durable, last everything that was written.

        Between them: the full size with zeros, with garbage, with the first part written, or with
        pages missing; and a size that ends in the middle.
        """
        issued = tuple(change for change in self._writes.get(inode, ()) if change.start <= moment)
        durable = sum(change.durable_at <= moment for change in issued)
        return self._variants(inode, _Writes(issued), durable)

    def everything(self, moment: int) -> Choice:
        """The state in which nothing was lost: what the program itself saw."""
        at = self.at(moment)
        return Choice(moment, frozenset(at.units), tuple((inode, n - 1) for inode, n in at.pending_files.items()))

    def image(self, choice: Choice) -> Image:
        at = self.at(choice.moment)
        units = set(choice.units)
        units |= {needed for unit in choice.units if (needed := self._needs.get(unit)) is not None}
        image = Image({inode: {} for inode in at.directories})
        for entry in at.entries:
            if entry.durable_at <= choice.moment or entry.unit in units:
                names = image.directories[entry.directory]
                if entry.inode is None:
                    names.pop(entry.name, None)
                else:
                    names[entry.name] = entry.inode
        chosen = dict(choice.files)
        image.files = {inode: variants[chosen.get(inode, 0)] for inode, variants in at.contents.items()}
        return image


def _reachable(issued: list[EntryChange], moment: int) -> set[int]:
    """Every inode that some choice of pending changes gives a path from the top."""
    possible: dict[int, dict[str, set[int]]] = {}
    for entry in issued:
        names = possible.setdefault(entry.directory, {})
        if entry.durable_at <= moment:
            names[entry.name] = set()
        if entry.inode is not None:
            names.setdefault(entry.name, set()).add(entry.inode)
    found: set[int] = set()
    waiting = [TOP]
    while waiting:
        inode = waiting.pop()
        if inode not in found:
            found.add(inode)
            waiting += [below for inodes in possible.get(inode, {}).values() for below in inodes]
    return found


class _Writes:
    """A sequence of writes as a cheap cache key: writes of one file only grow in number."""

    def __init__(self, changes: tuple[DataChange, ...]) -> None:
        self.changes = changes

    def __hash__(self) -> int:
        return len(self.changes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Writes) and len(self.changes) == len(other.changes)


def _variants(inode: int, writes: _Writes, num_durable: int) -> tuple[Content, ...]:
    changes = sorted(writes.changes, key=lambda change: change.durable_at)
    base = _apply(b"", changes[:num_durable])
    full = _apply(base, changes[num_durable:])
    if base == full:
        return (Content(full),)
    touched = [sector for sector in range(-(-len(full) // SECTOR)) if _sector(base, sector) != _sector(full, sector)]
    noise = random.Random(inode)
    zeros = base[: len(full)] + bytes(max(len(full) - len(base), 0))
    middle = touched[: len(touched) // 2]
    candidates = [
        zeros,
        _overlay(zeros, noise.randbytes(len(full)), touched),
        _overlay(zeros, full, touched[:1]),
        _overlay(zeros, full, middle),
        _overlay(zeros, full, touched[:-1]),
        _overlay(zeros, full, [sector for sector in touched if sector * SECTOR // PAGE % 2 == 0]),
        _overlay(zeros, full, touched[len(touched) // 2 :]),
        full[: (len(middle) * SECTOR) // PAGE * PAGE] if middle else b"",
        full[: len(full) // SECTOR * SECTOR],
    ]
    distinct = dict.fromkeys(data for data in candidates if data not in (base, full))
    return (Content(base), *map(Content, distinct), Content(full))


def _apply(data: bytes, changes: list[DataChange]) -> bytes:
    result = bytearray(data)
    for change in changes:
        end = change.offset + len(change.data or b"")
        if change.data is None:
            del result[change.offset :]
        result.extend(bytes(max(end - len(result), 0)))
        if change.data is not None:
            result[change.offset : end] = change.data
    return bytes(result)


def _sector(data: bytes, sector: int) -> bytes:
    return data[sector * SECTOR : (sector + 1) * SECTOR]


def _overlay(under: bytes, over: bytes, sectors: list[int]) -> bytes:
    """*under* with some of its sectors taken from *over*."""
    result = bytearray(under)
    for sector in sectors:
        start = sector * SECTOR
        result[start : start + SECTOR] = over[start : start + SECTOR][: max(len(under) - start, 0)]
    return bytes(result)


def choices(disk: Disk, seed: int) -> Iterator[Choice]:
    """All systematic choices, the extreme ones of every moment first, then random ones without end."""
    noise = random.Random(seed)
    moments = disk.history.moments
    for moment in moments:
        yield from _extremes(disk, moment)
    singles = [choice for moment in moments for choice in _single_choices(disk, moment)]
    noise.shuffle(singles)
    yield from singles
    while True:
        yield _random_choice(disk, noise.choice(moments), noise)


def _extremes(disk: Disk, moment: int) -> Iterator[Choice]:
    """Nothing persisted; everything; and all names, but of no file more than its size."""
    at = disk.at(moment)
    yield Choice(moment)
    if at.units or at.pending_files:
        yield disk.everything(moment)
        yield Choice(moment, frozenset(at.units))
        yield Choice(moment, frozenset(at.units), tuple((inode, 1) for inode in at.pending_files))


def _single_choices(disk: Disk, moment: int) -> Iterator[Choice]:
    """Each pending item alone, and all but each, files in each of their variants."""
    at = disk.at(moment)
    everything = disk.everything(moment)
    for unit in at.units:
        yield Choice(moment, frozenset([unit]))
        yield Choice(moment, everything.units - {unit}, everything.files)
        # Names are of metadata, which a journal may commit long before the data.
        yield Choice(moment, everything.units - {unit})
    for inode, num_variants in at.pending_files.items():
        others = tuple(item for item in everything.files if item[0] != inode)
        for variant in range(num_variants - 1):
            yield Choice(moment, everything.units, (*others, (inode, variant)))
            yield Choice(moment, frozenset(), ((inode, variant + 1),))


def _random_choice(disk: Disk, moment: int, noise: random.Random) -> Choice:
    at = disk.at(moment)
    share = noise.choice((0.15, 0.5, 0.85))
    units = frozenset(unit for unit in at.units if noise.random() < share)
    written = [item for item in at.pending_files.items() if noise.random() < share]
    return Choice(moment, units, tuple((inode, noise.randrange(count)) for inode, count in written))
