"""The wakeup descriptor of the interpreter, shared with whoever had it before."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable

from asyncckpt.logs import get_logger

__all__ = ["Wakeup"]

_logger = get_logger("asyncckpt")
_OURS = 0x80  # added to a signal number by `Wakeup.tell`; the interpreter writes the number alone


class Wakeup:
    """Takes the wakeup descriptor over and passes on what it hears to the previous owner (an event loop).

    Whoever takes it from us later (``loop.add_signal_handler``) does not pass anything on; that is what
    `tell` is for. Made and closed in the main thread.

    Args:
        hear: called by the listening thread with the signal number and whether the interpreter wrote it.

    Raises:
        ValueError: not in the main thread of the main interpreter.
    """

    def __init__(self, hear: Callable[[int, bool], None]) -> None:
        self._hear = hear
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        try:
            self._previous = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        except ValueError:
            self._close_sockets()
            raise
        # A duplicate: the number of a descriptor that its owner closed may belong to a file by now.
        self._previous_copy = os.dup(self._previous) if self._previous >= 0 else -1
        self._thread = threading.Thread(target=self._listen, name="asyncckpt-signals", daemon=True)
        self._thread.start()

    def tell(self, signum: int) -> None:
        """Have the listening thread hear *signum*; for signal handlers."""
        with contextlib.suppress(OSError):  # full of signals it has not heard yet
            self._theirs.send(bytes([signum | _OURS]))

    def _listen(self) -> None:
        while data := self._ours.recv(4096):
            raw = bytes(byte for byte in data if not byte & _OURS)
            if raw and self._previous_copy >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._previous_copy, raw)
            for byte in dict.fromkeys(data):
                self._hear(byte & ~_OURS, not byte & _OURS)

    def close(self) -> None:
        """Give the descriptor back, unless somebody else has it by now."""
        current = signal.set_wakeup_fd(-1)
        if current == self._theirs.fileno():
            self._give_back()
        elif current >= 0:
            signal.set_wakeup_fd(current)
        self._theirs.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._ours.close()
        self._close_copy()

    def _give_back(self) -> None:
        # ValueError: its owner has closed it meanwhile.
        with contextlib.suppress(OSError, ValueError):
            if self._previous >= 0 and os.path.sameopenfile(self._previous, self._previous_copy):
                signal.set_wakeup_fd(self._previous)

    def close_in_child(self) -> None:
        """`close` in a forked child, which has no listening thread."""
        if signal.set_wakeup_fd(-1) == self._theirs.fileno():
            self._give_back()
        self._close_sockets()
        self._close_copy()

    def _close_sockets(self) -> None:
        self._theirs.close()
        self._ours.close()

    def _close_copy(self) -> None:
        if self._previous_copy >= 0:
            os.close(self._previous_copy)
            self._previous_copy = -1

    def __repr__(self) -> str:
        return f"<Wakeup after {self._previous}>"
