"""``asyncckpt run -- command``: a small init that does not leave before the writers of its command have.

A writer outlives its trainer, but not its container: when process 1 ends, the kernel kills everything in it. So this is
process 1 (or, elsewhere, the subreaper to which orphans fall), and waits for the writers that are left.

Signals are never handled here, only taken one by one from the kernel with ``sigtimedwait``: they must be blocked for
that, which is also what lets process 1 receive them at all, and it tells who sent them.

Process groups. Off a terminal the command gets a group of its own, so that a signal to our group reaches it once,
through us. In the foreground of a terminal it shares ours, so that Ctrl-Z, Ctrl-C and reading work as without us; what
the terminal sends, the command has got already, and it is not passed on. Rejected: a group of its own there, too, which
must be made the foreground group and stopped and continued by hand, as a shell does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

from asyncckpt.cli.orphans import OrphanedWriter, orphaned_writers

__all__ = ["run"]

_PR_SET_CHILD_SUBREAPER = 36
_SI_KERNEL = 0x80
_FORWARDED = tuple(getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH"))
_TAKEN = {*_FORWARDED, signal.SIGCHLD}
_LEAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_IGNORED_BY_PYTHON = [signal.SIGPIPE, signal.SIGXFSZ]
_LOOK_S = 0.1
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # as shells have it


def run(command: Sequence[str], grace_s: float) -> int:
    """Run *command*, wait for it and then for its writers.

    Args:
        command: program and arguments.
        grace_s: how long to wait for writers once the command is gone.

    Returns:
        Its exit code; 128 + n when signal n has ended it; 126 and 127 when it cannot be run.
    """
    _adopt_orphans()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it, as some parents do, has no children to wait for
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
    try:
        child = _Child(command, before)
    except OSError as error:
        _say(f"{command[0]}: {error.strerror}")
        return _NOT_FOUND if error.errno == errno.ENOENT else _NOT_EXECUTABLE
    code = child.wait()
    _wait_for_writers(code, grace_s)
    return code


class _Child:
    """The command.

    Args:
        command: program and arguments.
        mask: signals that are blocked in it.

    Raises:
        OSError: it cannot be run.
    """

    def __init__(self, command: Sequence[str], mask: Iterable[int]) -> None:
        self._shares_group = _is_in_foreground()
        self._pid = os.posix_spawnp(
            command[0],
            list(command),
            os.environ,
            setpgroup=os.getpgrp() if self._shares_group else 0,
            setsigmask=mask,
            setsigdef=_IGNORED_BY_PYTHON,
        )

    def wait(self) -> int:
        """Pass signals on until it has ended; its exit code."""
        while True:
            # The timeout is for safety: signals of one kind that come together arrive as one.
            taken = signal.sigtimedwait(_TAKEN, 1.0)
            if taken is not None and taken.si_signo != signal.SIGCHLD:
                self._pass_on(taken)
            status = reap().get(self._pid)
            if status is not None:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def _pass_on(self, taken: signal.struct_siginfo) -> None:
        if self._shares_group and taken.si_code == _SI_KERNEL:
            return
        os.kill(self._pid, taken.si_signo)  # not reaped yet: its number is nobody else's


def reap() -> Mapping[int, int]:
    """Take the wait status of every child that has ended, by process."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended[pid] = status


def _adopt_orphans() -> None:
    if os.getpid() != 1 and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        _say("cannot become the parent of orphans: writers that outlive the command are not waited for")


def _is_in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _wait_for_writers(code: int, grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    told: list[OrphanedWriter] = []
    is_leaving = False
    while writers := orphaned_writers():
        if [writer.pid for writer in writers] != [writer.pid for writer in told]:
            told = writers
            _say(f"the command has ended ({_describe(code)}); waiting up to {grace_s:g} s for {_list(writers)}")
        if time.monotonic() >= deadline:
            _say(f"leaving after {grace_s:g} s, and {_list(writers)} not done")
            return
        taken = signal.sigtimedwait(_TAKEN, _LOOK_S)
        reap()
        if taken is not None and taken.si_signo in _LEAVING:
            if is_leaving:
                _say(f"leaving, and {_list(writers)} not done")
                return
            is_leaving = True
            _say(f"still waiting for {_list(writers)}; signal again to leave")
    reap()


def _describe(code: int) -> str:
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"


def _list(writers: Sequence[OrphanedWriter]) -> str:
    return ", ".join(map(str, writers))


def _say(what: str) -> None:
    sys.stderr.write(f"asyncckpt run: {what}\n")
    sys.stderr.flush()
