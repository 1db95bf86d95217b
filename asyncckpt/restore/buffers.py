"""Memory that decoding threads read files into."""

from __future__ import annotations

import threading

__all__ = ["ThreadBuffers"]


class ThreadBuffers(threading.local):
    """One reused read buffer per thread: fresh memory for every chunk costs more than decoding it."""

    def __init__(self) -> None:
        self._block = bytearray()

    def get(self, num_bytes: int) -> memoryview:
        """The first *num_bytes* of this thread's buffer, contents undefined."""
        if len(self._block) < num_bytes:
            self._block = bytearray(num_bytes)
        return memoryview(self._block)[:num_bytes]
