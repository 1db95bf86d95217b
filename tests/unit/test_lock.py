"""The run lock, with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt.errors import RootLockedError, StorageError
from asyncckpt.repository.lock import RunLock
from asyncckpt.stores import LocalStore

PACKAGE_PARENT = str(Path(asyncckpt.__file__).parent.parent)


@contextmanager
def python(code: str, *arguments: object, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs *code* and is killed at the end; it is told by lines on its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLD = """
    import sys
    from asyncckpt.repository.lock import RunLock
    lock = RunLock.acquire(sys.argv[1], {"run": "other"})
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_is_exclusive_within_a_process_and_free_after_release(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    with pytest.raises(RootLockedError) as error:
        RunLock.acquire(tmp_path, timeout_s=60)
    assert error.value.fields["pid"] == os.getpid()
    lock.release()
    lock.release()
    with RunLock.acquire(tmp_path) as again:
        assert again.fileno() >= 0
    with RunLock.acquire(tmp_path):
        pass


def test_roots_may_be_given_as_store_path_or_url(tmp_path: Path) -> None:
    with RunLock.acquire(LocalStore(tmp_path)):
        for root in (str(tmp_path), tmp_path.as_uri()):
            with pytest.raises(RootLockedError):
                RunLock.acquire(root)


def test_the_owner_is_recorded_for_others(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path, {"run": "abc"}):
        record = json.loads((tmp_path / ".asyncckpt" / "run.lock").read_text())
    assert record["pid"] == os.getpid()
    assert record["run"] == "abc"
    assert {"host", "started"} <= record.keys()


def test_an_owner_that_is_no_json_leaves_the_root_unlocked(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunLock.acquire(tmp_path, {"run": object()})
    RunLock.acquire(tmp_path).release()


def test_a_living_owner_is_named_at_once(tmp_path: Path) -> None:
    with python(HOLD, tmp_path) as other:
        assert line(other) == "locked"
        with pytest.raises(RootLockedError, match=f"process {other.pid} on .* since ") as error:
            RunLock.acquire(tmp_path, timeout_s=1000)
        assert error.value.fields["pid"] == other.pid
        assert error.value.retryable


def test_a_killed_owner_frees_the_root(tmp_path: Path) -> None:
    with python(HOLD, tmp_path) as other:
        assert line(other) == "locked"
        other.kill()
        other.wait()
        RunLock.acquire(tmp_path).release()


TRAINER_WITH_WRITER = """
    import os, subprocess, sys
    from asyncckpt.repository.lock import RunLock
    lock = RunLock.acquire(sys.argv[1])
    writer = subprocess.Popen(
        [sys.executable, "-c", sys.argv[2], str(lock.fileno())],
        pass_fds=(lock.fileno(), int(sys.argv[3])), stdin=int(sys.argv[3]), stdout=sys.stdout,
    )
    print("started", flush=True)
    os._exit(0) if sys.argv[4] == "die" else (lock.release(), writer.wait())
"""
WRITER = textwrap.dedent("""
    import sys
    from asyncckpt.repository.lock import RunLock
    lock = RunLock.adopt(int(sys.argv[1]))
    print("adopted", flush=True)
    sys.stdin.readline()
""")


@pytest.mark.parametrize("trainer", ["die", "release"])
def test_the_writer_keeps_the_lock_after_its_trainer(tmp_path: Path, trainer: str) -> None:
    told, tell = os.pipe()
    with python(TRAINER_WITH_WRITER, tmp_path, WRITER, told, trainer, pass_fds=(told,)) as process:
        assert {line(process), line(process)} == {"started", "adopted"}
        os.close(told)
        if trainer == "die":
            process.wait()
        with pytest.raises(RootLockedError, match="is being written by"):
            RunLock.acquire(tmp_path, timeout_s=0.2 if trainer == "die" else 1000)
        os.write(tell, b"finish\n")
        os.close(tell)
        # The writer of a dead trainer is waited for; of a living one it is not, so wait here.
        if trainer == "release":
            process.wait()
        RunLock.acquire(tmp_path, timeout_s=60).release()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    fork = """
        import os, sys
        from asyncckpt.repository.lock import RunLock
        lock = RunLock.acquire(sys.argv[1])
        if os.fork() == 0:
            print(repr(lock), flush=True)
            sys.stdin.readline()
            os._exit(0)
        os._exit(0)
    """
    with python(fork, tmp_path) as process:
        assert line(process) == "RunLock(released)"
        process.wait()
        RunLock.acquire(tmp_path).release()


def test_a_child_process_does_not_inherit_the_lock_unless_told(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    with python("import sys; print('up', flush=True); sys.stdin.readline()") as child:
        assert line(child) == "up"
        lock.release()
        RunLock.acquire(tmp_path).release()


def test_a_zombie_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock.acquire(tmp_path)
    with python("") as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        os.kill(zombie.pid, 0)  # it still has its number
        record(tmp_path, pid=zombie.pid, start_ticks=None)
        monkeypatch.setattr("time.sleep", lambda nap: lock.release())
        RunLock.acquire(tmp_path, timeout_s=60).release()


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({"start_ticks": 1}, True),
        ({"start_ticks": None}, False),
        ({"host": "elsewhere.example"}, False),
        ({"pid": "7"}, True),
        ({"pid": -1}, True),
    ],
)
def test_only_a_living_owner_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], waits: bool
) -> None:
    naps: list[float] = []
    lock = RunLock.acquire(tmp_path)
    record(tmp_path, **changes)
    # The lock is released "while" the waiter sleeps.
    monkeypatch.setattr("time.sleep", lambda nap: (naps.append(nap), lock.release()))
    if waits:
        RunLock.acquire(tmp_path, timeout_s=60).release()
    else:
        with pytest.raises(RootLockedError):
            RunLock.acquire(tmp_path, timeout_s=60)
    assert bool(naps) is waits
    lock.release()


@pytest.mark.parametrize("contents", [b"", b"\xff\xfe", b"[]", b"{"])
def test_an_unreadable_record_is_an_unknown_owner(tmp_path: Path, contents: bytes) -> None:
    lock = RunLock.acquire(tmp_path)
    (tmp_path / ".asyncckpt" / "run.lock").write_bytes(contents)
    with pytest.raises(RootLockedError, match="process unknown on an unknown host"):
        RunLock.acquire(tmp_path)
    lock.release()


def test_a_deleted_lock_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path = tmp_path / ".asyncckpt" / "run.lock"
    real = fcntl.flock
    deletions = iter([True])

    def flock_after_deletion(fd: int, operation: int) -> None:
        real(fd, operation)
        if next(deletions, False):
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock_after_deletion)
    with RunLock.acquire(tmp_path) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), path.stat())


def test_fileno_of_a_released_lock_is_an_error(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    lock.release()
    with pytest.raises(ValueError, match="released"):
        lock.fileno()


def test_an_adopted_lock_is_not_inherited_further(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    copy = os.dup(lock.fileno())
    os.set_inheritable(copy, True)
    adopted = RunLock.adopt(copy)
    assert not os.get_inheritable(adopted.fileno())
    lock.release()
    with pytest.raises(RootLockedError):
        RunLock.acquire(tmp_path)
    adopted.release()
    RunLock.acquire(tmp_path).release()


def test_a_root_that_cannot_be_locked_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="could not lock"):
        RunLock.acquire(tmp_path / "file")


def record(root: Path, **changes: object) -> None:
    path = root / ".asyncckpt" / "run.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
