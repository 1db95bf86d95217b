"""Hears signals in a thread, at once, also while the main thread is stuck in a long C call.

Python runs its signal handlers in the main thread, between two byte codes. A training process spends
seconds in one C call (a collective, a compiler, a big copy), and the grace period runs. What does not wait
is the byte that the handler of the interpreter, written in C, puts into ``signal.set_wakeup_fd``; a thread
reads it here.

Rejected: ``signal.sigwait`` or ``signalfd`` in a thread, for which the signal must be blocked in every
thread, so that the handlers of the user never run; ``anyio.open_signal_receiver`` and
``loop.add_signal_handler``, which replace the user's handler; doing the work in the handler, which may have
interrupted the very lock it needs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from asyncckpt.logs import get_logger
from asyncckpt.preemption.wakeup import Wakeup

__all__ = ["SignalSubscription", "watch_signals"]

_logger = get_logger("asyncckpt")
_STUCK_S = 1.0

_Handler = Callable[[int, FrameType | None], Any] | int


@dataclass(frozen=True, slots=True, eq=False)
class SignalSubscription:
    """Who wants to hear of which signals.

    Attributes:
        signals: their numbers.
        callback: called with the number in a thread of its own, at least once for each signal.
        repeat_s: a signal that comes again after so many seconds means: leave now.
    """

    signals: tuple[int, ...]
    callback: Callable[[int], None]
    repeat_s: float

    def close(self) -> None:
        """Hear no more; with the last subscription the previous handlers are back.

        Handlers can be set in the main thread only. Closed elsewhere, ours stays, does nothing but call the
        previous one, and goes when the main thread comes by.
        """
        _watch.remove(self)


def watch_signals(
    signals: Iterable[int], callback: Callable[[int], None], repeat_s: float
) -> SignalSubscription | None:
    """Subscribe to *signals*; None, and a line in the log, where no handler can be installed.

    Args:
        signals: see `SignalSubscription`, also for the rest.
        callback: must be quick; what it raises is logged.
        repeat_s: see `SignalSubscription`.
    """
    subscription = SignalSubscription(tuple(signals), callback, repeat_s)
    if not subscription.signals:
        return None
    try:
        _watch.add(subscription)
    except ValueError as error:  # another thread, or a subinterpreter
        _logger.warning("no signals are watched for preemption (%s); Checkpointer.preempt() does the same", error)
        return None
    return subscription


class _Installed:
    """Our handler for one signal. One object for each time it is installed: a handler that was put on top of an
    earlier one may go on calling that, which then only passes on, and must not call us in a circle.

    Attributes:
        previous: what was there before.
        is_repeated: the listening thread knows that the signal came again, and late enough.
    """

    def __init__(self, watch: _SignalWatch, signum: int, previous: _Handler) -> None:
        self._watch = watch
        self._signum = signum
        self._first: float | None = None
        self.previous = previous
        self.is_repeated = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        # In the main thread, between two byte codes of anything: no locks, no callbacks.
        if self._watch.is_active(self._signum, self):
            self._watch.num_handled += 1
            if not self._watch.is_wanted or self._is_second():
                self._leave()
                return
            self._watch.tell(self._signum)
        if callable(self.previous):
            self.previous(signum, frame)

    def _is_second(self) -> bool:
        now = time.monotonic()
        if self._first is None and not self.is_repeated:
            self._first = now
            return False
        return self._first is None or self.is_repeated or now - self._first >= self._watch.repeat_s(self._signum)

    def _leave(self) -> None:
        """What would happen without us, now."""
        if self._watch.is_wanted:
            _logger.warning("%s again: leaving now; the writer finishes what is staged", _name(self._signum))
        is_on_top = self.is_on_top
        self._watch.uninstall()
        if is_on_top:  # else a handler that was installed after ours has called us, and decides
            signal.raise_signal(self._signum)

    @property
    def is_on_top(self) -> bool:
        return signal.getsignal(self._signum) is self

    def remove(self) -> None:
        """Put back what was there; a handler installed after ours stays."""
        if self.is_on_top:
            signal.signal(self._signum, self.previous)


class _SignalWatch:
    """One per process: handlers and the wakeup descriptor are process-wide.

    State: changed in the main thread only, except ``_subscriptions`` (replaced, never changed) and
    ``_first_heard`` (the listening thread's).
    """

    def __init__(self) -> None:
        self._subscriptions: tuple[SignalSubscription, ...] = ()
        self._installed: dict[int, _Installed] = {}
        self._first_heard: dict[int, float] = {}
        self._wakeup: Wakeup | None = None
        self.num_handled = 0

    @property
    def is_wanted(self) -> bool:
        """Whether anybody is subscribed."""
        return bool(self._subscriptions)

    def is_active(self, signum: int, handler: _Installed) -> bool:
        """Whether *handler* is the one that stands for *signum* now."""
        return self._installed.get(signum) is handler

    def repeat_s(self, signum: int) -> float:
        """See `SignalSubscription.repeat_s`."""
        return min((entry.repeat_s for entry in self._subscriptions if signum in entry.signals), default=float("inf"))

    def add(self, subscription: SignalSubscription) -> None:
        """Install what is missing.

        Raises:
            ValueError: not in the main thread of the main interpreter.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signals can be handled in the main thread only")
        if self._wakeup is None:
            self._wakeup = Wakeup(self._hear)
        for signum in subscription.signals:
            if signum not in self._installed:
                self._install(signum)
        self._subscriptions = (*self._subscriptions, subscription)

    def _install(self, signum: int) -> None:
        previous = signal.getsignal(signum)
        if previous is signal.SIG_IGN:
            # Whoever ignores it, a parent that wants to be the one to react, had a reason.
            _logger.warning("%s is ignored by this process and not watched for preemption", _name(signum))
        elif previous is None:
            _logger.warning("%s has a handler in C that cannot be chained, and is not watched", _name(signum))
        else:
            self._installed[signum] = _Installed(self, signum, previous)
            signal.signal(signum, self._installed[signum])

    def remove(self, subscription: SignalSubscription) -> None:
        """Forget *subscription*; the last one takes the handlers with it."""
        self._subscriptions = tuple(other for other in self._subscriptions if other is not subscription)
        # Elsewhere the handler does it, when it is called.
        if not self._subscriptions and threading.current_thread() is threading.main_thread():
            self.uninstall()

    def uninstall(self) -> None:
        """Put everything back."""
        for handler in self._installed.values():
            handler.remove()
        self._installed.clear()
        self._first_heard.clear()
        if self._wakeup is not None:
            self._wakeup.close()
            self._wakeup = None

    def tell(self, signum: int) -> None:
        """From a handler: the wakeup descriptor may be somebody else's by now."""
        if self._wakeup is not None:
            self._wakeup.tell(signum)

    # -- listening thread ----------------------------------------------------------------------

    def _hear(self, signum: int, is_from_kernel: bool) -> None:
        for subscription in self._subscriptions:
            if signum in subscription.signals:
                try:
                    subscription.callback(signum)
                except Exception:
                    _logger.exception("a signal could not be passed on")
        if is_from_kernel and (handler := self._installed.get(signum)) is not None:
            now = time.monotonic()
            first = self._first_heard.setdefault(signum, now)
            if first is not now and now - first >= self.repeat_s(signum):
                self._insist(signum, handler)

    def _insist(self, signum: int, handler: _Installed) -> None:
        """See that the second signal is taken for one, also when the main thread is stuck or was for a while."""
        num_handled = self.num_handled
        handler.is_repeated = True
        time.sleep(_STUCK_S)
        if not self.is_active(signum, handler) or not handler.is_on_top:
            return
        if self.num_handled != num_handled:
            os.kill(os.getpid(), signum)  # it was handled before it was known that it is the second one
        elif handler.previous is signal.SIG_DFL:
            # As the first one would have without us.
            _logger.warning("%s again, and the main thread is stuck: leaving now", _name(signum))
            ctypes.CDLL(None).signal(signum, None)  # SIG_DFL; Python's own is for the main thread
            os.kill(os.getpid(), signum)

    # -- fork ----------------------------------------------------------------------------------

    def reset_in_child(self) -> None:
        """A DataLoader worker must neither react to signals nor write into our socket."""
        self._subscriptions = ()
        for handler in self._installed.values():
            handler.remove()
        self._installed.clear()
        if self._wakeup is not None:
            self._wakeup.close_in_child()
            self._wakeup = None

    def __repr__(self) -> str:
        return f"<_SignalWatch of {sorted(self._installed)} for {len(self._subscriptions)}>"


def _name(signum: int) -> str:
    return signal.Signals(signum).name


_watch = _SignalWatch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _watch.reset_in_child())
