"""Handlers are chained and put back, and a thread hears signals that the main thread cannot handle yet.

Signals are real, and sent to this process: SIGUSR1 and SIGUSR2, which nothing else uses.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from asyncckpt.preemption.signals import SignalSubscription, watch_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

TIMEOUT_S = 30.0


class Heard:
    """Counts what the listening thread says."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.signals: list[int] = []

    def __call__(self, signum: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        with self._changed:
            self.signals.append(signum)
            self._changed.notify_all()

    def wait(self, signum: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: signum in self.signals, TIMEOUT_S)


class UserHandler:
    """A handler as a user writes it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.calls += 1


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
    yield
    assert [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "asyncckpt-signals" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def user() -> Iterator[UserHandler]:
    """The user's handler for SIGUSR1, installed before ours."""
    handler = UserHandler()
    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    assert signal.getsignal(signal.SIGUSR1) is handler
    signal.signal(signal.SIGUSR1, before)


def watch(heard: Heard, *signals: int, repeat_s: float = 1e9) -> SignalSubscription:
    subscription = watch_signals(signals or (signal.SIGUSR1,), heard, repeat_s)
    assert subscription is not None
    return subscription


def test_a_signal_is_heard_and_the_handler_before_ours_runs_once(user: UserHandler) -> None:
    heard = Heard()
    subscription = watch(heard)
    signal.raise_signal(signal.SIGUSR1)
    heard.wait(signal.SIGUSR1)
    assert user.calls == 1
    subscription.close()
    subscription.close()
    signal.raise_signal(signal.SIGUSR1)
    assert user.calls == 2
    assert set(heard.signals) == {signal.SIGUSR1}


def test_a_handler_installed_after_ours_takes_nothing_from_us_and_stays(user: UserHandler) -> None:
    heard, later = Heard(), UserHandler()
    subscription = watch(heard)
    ours = signal.signal(signal.SIGUSR1, later)
    signal.raise_signal(signal.SIGUSR1)
    heard.wait(signal.SIGUSR1)
    assert (later.calls, user.calls) == (1, 0)
    subscription.close()
    assert signal.getsignal(signal.SIGUSR1) is later
    assert callable(ours)
    ours(signal.SIGUSR1, None)  # a handler that chains to ours reaches what was before us
    assert user.calls == 1
    signal.signal(signal.SIGUSR1, user)


def test_a_handler_that_chains_to_ours_and_stays_does_not_call_us_in_a_circle(user: UserHandler) -> None:
    heard = Heard()
    watch(heard).close()
    first = watch(heard)
    ours = signal.getsignal(signal.SIGUSR1)
    assert callable(ours)
    signal.signal(signal.SIGUSR1, lambda signum, frame: ours(signum, frame))
    later = signal.getsignal(signal.SIGUSR1)
    first.close()
    second = watch(heard)
    signal.raise_signal(signal.SIGUSR1)
    heard.wait(signal.SIGUSR1)
    assert user.calls == 1
    second.close()
    assert signal.getsignal(signal.SIGUSR1) is later
    signal.signal(signal.SIGUSR1, user)


def test_several_subscribers_share_one_handler(user: UserHandler) -> None:
    one, two = Heard(), Heard()
    first, second = watch(one), watch(two, signal.SIGUSR1, signal.SIGUSR2)
    signal.raise_signal(signal.SIGUSR1)
    one.wait(signal.SIGUSR1)
    two.wait(signal.SIGUSR1)
    first.close()
    assert signal.getsignal(signal.SIGUSR1) is not user
    second.close()


def test_an_ignored_signal_stays_ignored(caplog: pytest.LogCaptureFixture) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        subscription = watch(Heard())
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        subscription.close()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert "SIGUSR1 is ignored by this process" in caplog.text


def test_outside_of_the_main_thread_nothing_is_installed_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found: list[SignalSubscription | None] = []
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        thread = threading.Thread(target=lambda: found.append(watch_signals((signal.SIGUSR1,), Heard(), 1.0)))
        thread.start()
        thread.join()
    assert found == [None]
    assert len(caplog.records) == 1
    assert "Checkpointer.preempt() does the same" in caplog.text


def test_closed_in_another_thread_ours_passes_on_until_the_main_thread_comes_by(user: UserHandler) -> None:
    subscription = watch(Heard())
    thread = threading.Thread(target=subscription.close)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is not user
    signal.raise_signal(signal.SIGUSR1)
    assert user.calls == 1
    assert signal.getsignal(signal.SIGUSR1) is user


@pytest.mark.skipif(not Path("/proc/self/syscall").exists(), reason="needs proc(5)")
def test_the_thread_hears_while_the_main_thread_is_stuck_in_c(user: UserHandler) -> None:
    """A read(2) that starts again after each signal, as C libraries do; it ends when the thread has heard."""
    ours, theirs = os.pipe()
    handled_before: list[int] = []

    class Release(Heard):
        def __call__(self, signum: int) -> None:
            if not handled_before:
                handled_before.append(user.calls)
                os.write(theirs, b"x")

    def send_when_stuck() -> None:
        call = Path(f"/proc/self/task/{threading.main_thread().native_id}/syscall")  # number and arguments, proc(5)
        while call.read_text().split()[1:2] != [hex(ours)]:
            pass
        os.kill(os.getpid(), signal.SIGUSR1)

    subscription = watch(Release())
    signal.siginterrupt(signal.SIGUSR1, False)
    sender = threading.Thread(target=send_when_stuck)
    sender.start()
    ctypes.CDLL(None).read(ours, ctypes.create_string_buffer(1), 1)
    sender.join()
    assert handled_before == [0]
    assert user.calls == 1
    subscription.close()
    os.close(ours)
    os.close(theirs)


def test_a_forked_child_has_the_handlers_from_before_and_tells_us_nothing(user: UserHandler) -> None:
    heard = Heard()
    subscription = watch(heard, signal.SIGUSR1, signal.SIGUSR2)
    child = os.fork()
    if child == 0:
        restored = signal.getsignal(signal.SIGUSR1) is user and signal.set_wakeup_fd(-1) == -1
        signal.raise_signal(signal.SIGUSR1)
        os._exit(0 if restored and user.calls == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    signal.raise_signal(signal.SIGUSR2)
    heard.wait(signal.SIGUSR2)
    assert signal.SIGUSR1 not in heard.signals
    subscription.close()


def test_asyncio_keeps_its_signals_whoever_came_first() -> None:
    heard = Heard()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        woken = {signum: asyncio.Event() for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)}
        loop.add_signal_handler(signal.SIGUSR2, woken[signal.SIGUSR2].set)
        loop.add_signal_handler(signal.SIGUSR1, woken[signal.SIGUSR1].set)
        subscription = watch(heard)
        for signum in (signal.SIGUSR2, signal.SIGUSR1):  # ours too: its handler is chained
            signal.raise_signal(signum)
            await asyncio.wait_for(woken[signum].wait(), TIMEOUT_S)
        heard.wait(signal.SIGUSR1)
        heard.signals.clear()
        # From here on the loop has the descriptor, and knows nothing of us.
        loop.add_signal_handler(signal.SIGHUP, woken[signal.SIGHUP].set)
        for signum in (signal.SIGHUP, signal.SIGUSR1):
            signal.raise_signal(signum)
        await asyncio.wait_for(woken[signal.SIGHUP].wait(), TIMEOUT_S)
        heard.wait(signal.SIGUSR1)
        subscription.close()

    asyncio.run(main())


def test_closing_gives_the_descriptor_back_to_the_loop() -> None:
    async def main() -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR2, woken.set)
        watch(Heard()).close()
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.wait_for(woken.wait(), TIMEOUT_S)

    asyncio.run(main())


def test_trio_keeps_its_signals() -> None:
    trio = pytest.importorskip("trio")
    heard = Heard()

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGUSR2) as received:
            subscription = watch(heard)
            signal.raise_signal(signal.SIGUSR2)
            with trio.fail_after(TIMEOUT_S):
                async for signum in received:
                    assert signum == signal.SIGUSR2
                    break
            signal.raise_signal(signal.SIGUSR1)
            await trio.to_thread.run_sync(heard.wait, signal.SIGUSR1)
            subscription.close()

    trio.run(main)


# Processes that die of it.


def run(body: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import ctypes, os, signal, sys, threading, time
from asyncckpt.preemption.signals import watch_signals
heard = threading.Event()
def hear(signum): heard.set()
{textwrap.dedent(body)}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_the_first_signal_does_not_kill_and_the_second_does() -> None:
    done = run(
        """
        watch_signals((signal.SIGTERM,), hear, 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert heard.wait(30)
        print("alive", flush=True)
        signal.raise_signal(signal.SIGTERM)
        print("still alive")
        """
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "alive\n")
    assert "SIGTERM again: leaving now" in done.stderr


def test_a_repetition_that_comes_soon_is_the_same_signal() -> None:
    done = run(
        """
        watch_signals((signal.SIGTERM,), hear, 1e9)
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        """
    )
    assert done.returncode == 0


def test_the_second_signal_runs_the_users_handler_which_may_leave() -> None:
    done = run(
        """
        signal.signal(signal.SIGTERM, lambda *_: print("user", flush=True))
        watch_signals((signal.SIGTERM,), hear, 0.0)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        """
    )
    assert (done.returncode, done.stdout) == (0, "user\nuser\n")


def test_the_second_signal_kills_a_process_whose_main_thread_is_stuck() -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            """
import ctypes, os, signal
from asyncckpt.preemption.signals import watch_signals
watch_signals((signal.SIGTERM,), lambda signum: os.write(1, b"heard\\n"), 0.0)
signal.siginterrupt(signal.SIGTERM, False)
ours, theirs = os.pipe()
os.write(1, b"ready\\n")
ctypes.CDLL(None).read(ours, ctypes.create_string_buffer(1), 1)
""",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"heard\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == -signal.SIGTERM
