"""``asyncckpt run`` as process 1 of a PID namespace and as an ordinary process."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

import asyncckpt as ac

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and subreapers are Linux")

TIMEOUT_S = 90
RUN = [sys.executable, "-m", "asyncckpt", "run"]
NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_unshare() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run([*NAMESPACE, "true"], check=False).returncode


PLACES = [
    pytest.param([], id="subreaper"),
    pytest.param(
        NAMESPACE, id="pid 1", marks=pytest.mark.skipif(not can_unshare(), reason="PID namespaces are not permitted")
    ),
]


def run(place: list[str], *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    # Not pipes, which a writer that is left behind would keep open.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        whole = [*place, *RUN, *options, "--", *command]
        done = subprocess.run(whole, stdout=output, stderr=errors, timeout=TIMEOUT_S, check=False)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(whole, done.returncode, output.read(), errors.read())


def python(body: str) -> tuple[str, ...]:
    return sys.executable, "-u", "-c", textwrap.dedent(body)


def killed_trainer(root: Path, release: str) -> tuple[str, ...]:
    """Stages a save beside a stopped writer, which *release* is to wake later, and is killed."""
    return python(
        f"""
        import os, signal, subprocess, torch
        import asyncckpt as ac
        ckpt = ac.Checkpointer({str(root)!r}, {{"w": torch.arange(1000)}})
        writer = ckpt.health().writer_pid
        os.kill(writer, signal.SIGSTOP)
        ckpt.save(1).wait_staged()
        {release}
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )


@pytest.mark.parametrize("place", PLACES)
def test_the_writer_of_a_killed_trainer_is_waited_for(tmp_path: Path, place: list[str]) -> None:
    # The writer goes on only after the trainer is dead, a second later: nothing but waiting saves it.
    wake = 'subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {writer}"], start_new_session=True)'
    done = run(place, *killed_trainer(tmp_path / "run", wake))
    assert done.returncode == 128 + signal.SIGKILL
    assert "the command has ended (signal 9); waiting up to 30 s for the writer of" in done.stderr
    assert str(tmp_path / "run") in done.stderr
    assert ac.open(tmp_path / "run").verify(1).ok


@pytest.mark.parametrize("place", PLACES)
def test_it_leaves_after_the_grace_and_says_what_is_not_done(tmp_path: Path, place: list[str]) -> None:
    done = run(place, *killed_trainer(tmp_path / "run", 'print("writer", writer)'), options=("--grace", "0.5"))
    try:
        assert done.returncode == 128 + signal.SIGKILL
        assert "leaving after 0.5 s, and the writer of" in done.stderr
    finally:
        if not place:
            os.kill(int(done.stdout.split()[1]), signal.SIGKILL)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("body", "code"), [("raise SystemExit(3)", 3), ("import os; os.abort()", 128 + signal.SIGABRT), ("pass", 0)]
)
def test_the_exit_code_is_passed_on(place: list[str], body: str, code: int) -> None:
    assert run(place, *python(body)).returncode == code


def test_commands_that_cannot_be_run(tmp_path: Path) -> None:
    missing = run([], "no-such-command-anywhere")
    assert (missing.returncode, missing.stderr) == (
        127,
        "asyncckpt run: no-such-command-anywhere: No such file or directory\n",
    )
    assert run([], str(tmp_path)).returncode == 126


@pytest.mark.parametrize("place", PLACES)
def test_daemons_and_other_orphans_are_reaped_but_not_waited_for(place: list[str]) -> None:
    # The command ends only once its orphan, which ends at once, was reaped by process 1, and leaves a daemon.
    done = run(
        place,
        *python(
            """
            import os, subprocess, sys, time
            shell = 'sh -c "exit 0" & echo $!'
            orphan = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, text=True).stdout.strip()
            while os.path.exists(f"/proc/{orphan}"):
                time.sleep(0.01)
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            print(subprocess.Popen(["sleep", "100"], **quiet).pid)
            os._exit(5)
            """
        ),
    )
    if not place:
        os.kill(int(done.stdout), signal.SIGKILL)
    assert done.returncode == 5
    assert done.stderr == ""


TELL_SIGNALS = """
    import os, signal, sys
    names = ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH"]
    signals = [getattr(signal, "SIG" + name) for name in names]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print("ready", os.getpgrp() == os.getpid(), flush=True)
    while True:
        taken = signal.sigwait(signals)
        print(signal.Signals(taken).name, flush=True)
        if taken == signal.SIGTERM:
            sys.exit(7)
"""


def test_signals_reach_the_command_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*RUN, "--", *python(TELL_SIGNALS)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "ready True\n"
        for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTERM"):
            # To the group, as launchers do.
            os.killpg(runner.pid, getattr(signal, name))
            assert runner.stdout.readline() == f"{name}\n"
        assert runner.wait(TIMEOUT_S) == 7
        assert runner.stdout.read() == ""


def test_a_terminals_ctrl_c_reaches_the_command_once() -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [*RUN, "--", *python(TELL_SIGNALS)])
    shown = b""

    def show_until(text: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + TIMEOUT_S
        while text not in shown and time.monotonic() < deadline:
            shown += os.read(terminal, 1024)

    try:
        show_until(b"ready False")  # it shares our group
        os.write(terminal, b"\x03")
        show_until(b"SIGINT")
        os.kill(pid, signal.SIGTERM)
        show_until(b"SIGTERM")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert shown.count(b"SIGINT") == 1
    finally:
        os.close(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_while_waiting_leaves(tmp_path: Path, number: int) -> None:
    # The writer stays stopped.
    with subprocess.Popen(
        [*RUN, "--", *killed_trainer(tmp_path / "run", "print(writer, flush=True)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as runner:
        assert runner.stdout is not None
        assert runner.stderr is not None
        writer = int(runner.stdout.readline())
        try:
            lines = iter(runner.stderr)
            assert any("waiting up to" in line for line in lines)
            runner.send_signal(number)
            assert any("signal again to leave" in line for line in lines)
            runner.send_signal(number)
            assert any(": leaving, and the writer of" in line for line in lines)
            assert runner.wait(TIMEOUT_S) == 128 + signal.SIGKILL
        finally:
            os.kill(writer, signal.SIGKILL)
