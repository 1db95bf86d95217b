"""Which tensors are gathered on the device before they are copied to the host, and how. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asyncckpt.memory import ALIGNMENT_BYTES, aligned
from asyncckpt.options import SnapshotMode

__all__ = ["SMALL_BYTES", "Packing", "Run", "packing_choices", "plan_packing"]

SMALL_BYTES = 64 * 2**10
"""A copy to the host costs microseconds whatever its size: tensors up to this one are gathered first."""


class Run(NamedTuple):
    """Bytes that lie side by side in buffer and arena, so that one copy moves them."""

    arena_offset: int
    buffer_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How some tensors of a device are gathered in a buffer there.

    Attributes:
        positions: which, in the order of the arena.
        places: byte offset of each in the buffer.
        runs: the copies from the buffer to the arena.
        num_bytes: size of the buffer.
    """

    positions: tuple[int, ...]
    places: tuple[int, ...]
    runs: tuple[Run, ...]
    num_bytes: int


def plan_packing(positions: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Packing:
    """Gather the tensors at *positions*; neighbours in the arena become one run.

    Args:
        positions: tensors to gather.
        offsets: byte offset of every tensor in the arena.
        sizes: bytes of every tensor.
    """
    ordered = sorted(positions, key=offsets.__getitem__)
    places: list[int] = []
    runs: list[Run] = []
    filled = 0
    for position in ordered:
        offset, size = offsets[position], sizes[position]
        # The buffer repeats the arena's layout, padding included, so what is aligned there is aligned here.
        if runs and offset - (runs[-1].arena_offset + runs[-1].num_bytes) < ALIGNMENT_BYTES:
            start = runs[-1]
            runs[-1] = start._replace(num_bytes=offset + size - start.arena_offset)
        else:
            runs.append(Run(offset, aligned(filled), size))
        places.append(runs[-1].buffer_offset + offset - runs[-1].arena_offset)
        filled = places[-1] + size
    return Packing(tuple(ordered), tuple(places), tuple(runs), filled)


def packing_choices(mode: SnapshotMode, sizes: Sequence[int], is_owned: Sequence[bool]) -> list[tuple[int, ...]]:
    """What to gather on one device, best first; the last choice is nothing.

    Gathering is fast and lets training go on at once, but takes memory of the device. Everything is the ``"device"``
    mode. Next best is what no optimizer owns, since training waits for its copies otherwise. Small
    tensors are gathered in every mode.

    Args:
        mode: see `options.Staging`.
        sizes: bytes of each tensor.
        is_owned: whether its optimizer waits for its copy.
    """
    everything = tuple(range(len(sizes)))
    small = tuple(index for index in everything if sizes[index] <= SMALL_BYTES)
    loose = tuple(index for index in everything if sizes[index] <= SMALL_BYTES or not is_owned[index])
    choices = [everything] if mode in ("auto", "device") else []
    choices += [small, ()] if mode == "blocking" else [loose, small, ()]
    return list(dict.fromkeys(choices))
