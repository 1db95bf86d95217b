"""Whether compressing pays, from what it and the storage were measured to take within this save."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["CompressionRates"]

_ENOUGH_BYTES = 64 * 2**20
_WORTH = 2.0
"""How much longer a save may take for being smaller, where the storage is faster than the cores that compress."""


class CompressionRates:
    """Compares how fast large files are compressed with how fast they are written.

    Storage that takes far more than the cores can compress would wait for them: there a chunk is stored as
    it is, in a frame of the same codec. Thread-safe.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.begin()

    def begin(self) -> None:
        """Another save: neither the machine nor the storage need be what they were."""
        with self._lock:
            self._compressed_bytes = self._written_bytes = 0
            self._compress_s = self._busy_s = 0.0
            self._num_writing = 0
            self._busy_since = 0.0

    def note_compressed(self, raw_bytes: int, seconds: float) -> None:
        """One thread took *seconds* to compress so much."""
        with self._lock:
            self._compressed_bytes += raw_bytes
            self._compress_s += seconds

    @contextlib.contextmanager
    def writing(self, num_bytes: int) -> Iterator[None]:
        """Around a call that waits for the storage to take *num_bytes*; several threads may be in one at a time."""
        with self._lock:
            if self._num_writing == 0:
                self._busy_since = self._clock()
            self._num_writing += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_writing -= 1
                self._written_bytes += num_bytes
                if self._num_writing == 0:
                    self._busy_s += self._clock() - self._busy_since

    def is_worth_compressing(self, num_cores: int) -> bool:
        """Whether to compress the next chunk, with *num_cores* at it; True until enough is known."""
        with self._lock:
            if min(self._compressed_bytes, self._written_bytes) < _ENOUGH_BYTES:
                return True
            compressed_per_s = num_cores * self._compressed_bytes / max(self._compress_s, 1e-9)
            written_per_s = self._written_bytes / max(self._busy_s, 1e-9)
            return written_per_s <= _WORTH * compressed_per_s

    def __repr__(self) -> str:
        return (
            f"<CompressionRates {self._compressed_bytes} bytes in {self._compress_s:.3f} s, "
            f"written {self._written_bytes} in {self._busy_s:.3f} s>"
        )
