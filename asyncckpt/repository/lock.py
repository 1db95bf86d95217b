"""One writing run per root: an flock that trainer and writer process share.

The lock belongs to the *open file description*. The trainer opens it, the writer process inherits the
descriptor, and the root stays locked until both have closed it, however they end. That is what is
wanted when a trainer dies: its writer still commits what was staged, and the next run must wait for
that. Two consequences:

* Nobody ever calls ``flock(LOCK_UN)``: it would unlock for every holder. Releasing is closing.
* A child that merely forks off the trainer (a data loader worker) must not keep the lock alive, so
  the descriptor is closed in it at once.

See ``docs/decisions/011-run-lock.md`` for why this is not ``filelock``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self

from asyncckpt.errors import RootLockedError, StorageError
from asyncckpt.processes import process_status
from asyncckpt.repository.names import LOCK
from asyncckpt.stores.contract import Store
from asyncckpt.stores.local import local_path

__all__ = ["RunLock"]

_POLL_S = 0.1
_MAX_RECORD_BYTES = 64 * 1024
_live: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """The right to write to a root. Make one with `acquire`, or with `adopt` in the writer process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        _live.add(self)

    def __repr__(self) -> str:
        return f"RunLock(fd={self._fd})" if self._fd >= 0 else "RunLock(released)"

    @classmethod
    def acquire(
        cls, root: Store | str | os.PathLike[str], owner: Mapping[str, Any] | None = None, timeout_s: float = 0.0
    ) -> RunLock:
        """Lock *root*.

        When the lock is held by a run whose trainer is dead, that run's writer is finishing its last
        checkpoint; it is worth waiting for. When the trainer lives, waiting is not.

        Args:
            root: an existing local root.
            owner: JSON values to record for whoever meets the lock, besides ``pid``, ``host`` and ``started``.
            timeout_s: how long to wait for the writer of a dead run.

        Raises:
            RootLockedError: another run holds it; ``fields`` has the recorded ``pid``, ``host`` and ``started``.
            StorageError: the lock file cannot be opened, or the file system has no locks.
        """
        path = f"{local_path(root if isinstance(root, (str, os.PathLike)) else root.url)}/{LOCK}"
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                fd = _try_lock(path)
                if fd is not None:
                    break
                holder = _read_record(path)
                if _is_alive(holder) or time.monotonic() >= deadline:
                    raise _locked(path, holder)
                time.sleep(min(_POLL_S, max(deadline - time.monotonic(), 0)))
            lock = cls(fd)
            try:
                _write_record(fd, owner or {})
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise StorageError.from_os_error(error, f"lock {path}", path=path) from error
        return lock

    @classmethod
    def adopt(cls, fd: int) -> RunLock:
        """Take over a descriptor inherited from the process that called `acquire`."""
        os.set_inheritable(fd, False)
        return cls(fd)

    def fileno(self) -> int:
        """The descriptor, for ``subprocess.Popen(pass_fds=...)``.

        Raises:
            ValueError: the lock was released.
        """
        if self._fd < 0:
            raise ValueError("the lock was released")
        return self._fd

    def release(self) -> None:
        """Close this process's descriptor; the root is free once every other holder closed its own.

        Never raises; a second call does nothing.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _release_in_forked_child() -> None:
    # subprocess does not run fork hooks, so the writer process keeps what pass_fds gave it.
    for lock in list(_live):
        lock.release()


os.register_at_fork(after_in_child=_release_in_forked_child)


def _try_lock(path: str) -> int | None:
    """A locked descriptor of *path*, or ``None`` when somebody else holds the lock."""
    while True:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the file was deleted between open and flock: this lock protects nothing


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _write_record(fd: int, owner: Mapping[str, Any]) -> None:
    record: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **owner,
    }
    record["start_ticks"] = (process_status(record["pid"]) or (None, None))[1]
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(record).encode(), 0)


def _read_record(path: str) -> dict[str, Any]:
    """What the holder recorded; empty when it has not yet, or when the file is not readable as such."""
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read(_MAX_RECORD_BYTES))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether to give up at once. An unknown holder has just locked, or is just gone: look again."""
    pid, host = holder.get("pid"), holder.get("host")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if host != socket.gethostname():
        return True  # cannot be known from here, and the lock itself says that somebody is
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    status = process_status(pid)
    if status is None:
        return True
    state, start_ticks = status
    # A zombie is dead, although nobody has waited for it (containers without an init never do). A
    # process that started at another time merely has the same number.
    return state not in "ZX" and holder.get("start_ticks") in (None, start_ticks)


def _locked(path: str, holder: dict[str, Any]) -> RootLockedError:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
    since = f" since {holder['started']}" if "started" in holder else ""
    known = {name: holder[name] for name in ("pid", "host", "started") if name in holder}
    return RootLockedError(
        f"{os.path.dirname(os.path.dirname(path))} is being written by {who}{since}; "
        "wait for that run, stop it, or use another root",
        path=path,
        **known,
    )
