"""How long it takes to make staged bytes durable, learnt from the saves of this run."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

from asyncckpt.model import SaveStats

__all__ = ["UNKNOWN_BANDWIDTH", "Bandwidth", "BandwidthMeter"]

_PLAIN_ENCODE_S_PER_BYTE = 1 / 1.0e9  # copying and three digests, one thread
_MIN_BYTES = 2**20  # the time of smaller saves says something about files, not about bytes
_NUM_REMEMBERED = 3


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """A model with two terms: the CPU handles raw bytes, the storage takes stored ones.

    One number per way of writing would not do: when the storage slows down, dropping compression makes
    it worse, and when the CPU is what is slow, better.

    Attributes:
        encode_s_per_byte: wall seconds to compress and hash a raw byte.
        plain_encode_s_per_byte: the same without compression.
        write_s_per_byte: wall seconds to write a stored byte.
        ratio: stored per raw byte when compressed.
        overhead_s: of one save, whatever its size: the commit.
    """

    encode_s_per_byte: float
    plain_encode_s_per_byte: float
    write_s_per_byte: float
    ratio: float
    overhead_s: float

    def seconds(self, num_bytes: int, *, compress: bool) -> float:
        """Seconds until *num_bytes* raw bytes of one save are durable."""
        return num_bytes / self.bytes_s(compress=compress) + self.overhead_s

    def bytes_s(self, *, compress: bool) -> float:
        """Raw bytes per second."""
        if compress:
            return 1 / (self.encode_s_per_byte + self.ratio * self.write_s_per_byte)
        return 1 / (self.plain_encode_s_per_byte + self.write_s_per_byte)

    def as_observed(self, bytes_s: float, *, compress: bool) -> Bandwidth:
        """The same after *bytes_s* raw bytes per second were seen; the storage is held responsible for the change."""
        encode = self.encode_s_per_byte if compress else self.plain_encode_s_per_byte
        write = (1 / bytes_s - encode) / (self.ratio if compress else 1.0)
        return replace(self, write_s_per_byte=max(write, 1e-12))


UNKNOWN_BANDWIDTH = Bandwidth(
    encode_s_per_byte=1 / 300e6,
    plain_encode_s_per_byte=_PLAIN_ENCODE_S_PER_BYTE,
    write_s_per_byte=1 / 150e6,
    ratio=0.95,
    overhead_s=0.3,
)
"""Before any save of this run: one busy core and a modest disk."""


class BandwidthMeter:
    """Learns from durable saves; the slowest of the last few counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: deque[Bandwidth] = deque(maxlen=_NUM_REMEMBERED)

    def note(self, stats: SaveStats) -> None:
        """A compressed save with these *stats* became durable."""
        bandwidth = _bandwidth_of(stats)
        if bandwidth is not None:
            with self._lock:
                self._seen.append(bandwidth)

    @property
    def bandwidth(self) -> Bandwidth:
        """The estimate now."""
        with self._lock:
            return min(self._seen, key=lambda seen: seen.bytes_s(compress=True), default=UNKNOWN_BANDWIDTH)

    def __repr__(self) -> str:
        seen = self.bandwidth
        return (
            f"<BandwidthMeter {seen.bytes_s(compress=True) / 1e6:.0f} MB/s compressed, "
            f"{seen.bytes_s(compress=False) / 1e6:.0f} MB/s plain, {len(self._seen)} saves>"
        )


def _bandwidth_of(stats: SaveStats) -> Bandwidth | None:
    stored = stats.stored_bytes - stats.linked_bytes
    # Linked files have cost nothing but their hash.
    raw = int(stats.raw_bytes * (stored / stats.stored_bytes)) if stats.stored_bytes else 0
    wall_s = stats.durable_s - stats.stage_s - stats.commit_s  # waiting for an earlier save included: careful
    busy_s = stats.encode_s + stats.write_s
    if raw < _MIN_BYTES or wall_s <= 0 or busy_s <= 0:
        return None
    encode = wall_s * (stats.encode_s / busy_s) / raw
    return Bandwidth(
        encode_s_per_byte=encode,
        plain_encode_s_per_byte=min(encode, _PLAIN_ENCODE_S_PER_BYTE),
        write_s_per_byte=max(wall_s * (stats.write_s / busy_s) / stored, 1e-12),
        ratio=stored / raw,
        overhead_s=stats.commit_s,
    )
