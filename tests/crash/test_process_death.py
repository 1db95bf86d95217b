"""Deaths of trainer and writer. The writer is stopped first, so that every death has its moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from tests.crash.machine import wait_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd and a writer process")

TIMEOUT_S = 60


def run_trainer(root: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import ctypes, os, signal, sys
import torch
import asyncckpt as ac

root = {str(root)!r}
state = {{"w": torch.arange(3_000_000, dtype=torch.float32)}}
{textwrap.dedent(body)}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)


def test_staged_save_survives_sigkill_of_the_trainer(tmp_path: Path) -> None:
    # The writer is stopped until the trainer is dead: nothing was written while it lived.
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
            import os, signal, torch
            import asyncckpt as ac
            ckpt = ac.Checkpointer({str(tmp_path)!r}, {{"w": torch.arange(3_000_000, dtype=torch.float32)}})
            pid = ckpt.health().writer_pid
            os.kill(pid, signal.SIGSTOP)
            ckpt.save(1).wait_staged()
            print(pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    writer_pid = int(trainer.stdout.readline())
    assert trainer.wait(TIMEOUT_S) == -signal.SIGKILL
    trainer.stdout.close()
    assert ac.open(tmp_path).latest is None
    os.kill(writer_pid, signal.SIGCONT)
    wait_gone(writer_pid)
    assert ac.open(tmp_path).verify(1).ok
    assert torch.equal(ac.load(tmp_path, 1)["w"], torch.arange(3_000_000, dtype=torch.float32))
    assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())


@pytest.mark.parametrize(
    "death", ["os._exit(3)", "os.abort()", "os.kill(os.getpid(), signal.SIGKILL)", "ctypes.string_at(0)"]
)
def test_every_kind_of_death_after_staging_ends_in_a_commit(tmp_path: Path, death: str) -> None:
    done = run_trainer(
        tmp_path,
        f"""
        ckpt = ac.Checkpointer(root, state)
        ckpt.save(1).wait_staged()
        print(ckpt.health().writer_pid, flush=True)
        {death}
        """,
    )
    wait_gone(int(done.stdout))
    # The next run gets the root at once: no stale lock.
    with ac.Checkpointer(tmp_path, {"w": torch.zeros(3_000_000)}) as ckpt:
        found = ckpt.restore()
        assert found is not None
        assert found.step == 1


def test_next_run_waits_for_the_writer_of_a_dead_one(tmp_path: Path) -> None:
    done = run_trainer(
        tmp_path,
        """
        ckpt = ac.Checkpointer(root, state)
        pid = ckpt.health().writer_pid
        os.kill(pid, signal.SIGSTOP)
        ckpt.save(1).wait_staged()
        print(pid, flush=True)
        # Resumes the writer only when the next run is certainly waiting or about to.
        if os.fork() == 0:
            os.execv("/bin/sh", ["sh", "-c", f"exec >/dev/null 2>&1; sleep 1; kill -CONT {pid}"])
        os._exit(0)
        """,
    )
    with ac.Checkpointer(tmp_path, {"w": torch.zeros(3_000_000)}) as ckpt:
        found = ckpt.restore()
    assert found is not None
    assert found.step == 1
    wait_gone(int(done.stdout))


def test_interpreter_exit_without_close_waits_for_durability(tmp_path: Path) -> None:
    done = run_trainer(tmp_path, "ac.Checkpointer(root, state).save(1); globals()['keep'] = ac")
    assert done.returncode == 0, done.stderr
    assert ac.open(tmp_path).verify(1).ok


def test_trainer_that_dies_while_streaming_commits_nothing(tmp_path: Path) -> None:
    done = run_trainer(
        tmp_path,
        """
        import threading
        state = {f"t{i}": torch.ones(100_000) for i in range(20)}
        ckpt = ac.Checkpointer(root, state, staging=ac.Staging(memory_limit=1_000_000))
        pid = ckpt.health().writer_pid
        print(pid, flush=True)
        os.kill(pid, signal.SIGSTOP)
        submitted = threading.Event()
        send = ckpt._saves._client.submit
        ckpt._saves._client.submit = lambda *a: (send(*a), submitted.set())
        threading.Thread(target=lambda: ckpt.save(1), daemon=True).start()
        submitted.wait()
        os.kill(pid, signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    wait_gone(int(done.stdout))
    assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_killed_writer_is_replaced_and_the_save_still_becomes_durable(tmp_path: Path, death: signal.Signals) -> None:
    weights = torch.randn(2_000_000)
    with ac.Checkpointer(tmp_path, {"w": weights}) as ckpt:
        first_pid = ckpt.health().writer_pid
        os.kill(first_pid, signal.SIGSTOP)
        saving = ckpt.save(1)
        saving.wait_staged()
        writer = os.pidfd_open(first_pid)
        signal.pidfd_send_signal(writer, death)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(writer, signal.SIGCONT)  # the stopped die of nothing but SIGKILL
        os.close(writer)
        saving.result(timeout=TIMEOUT_S)
        assert ckpt.health().writer_pid != first_pid
        assert torch.equal(ckpt.load(1)["w"], weights)
        ckpt.save(2).result(timeout=TIMEOUT_S)


def test_writer_that_keeps_dying_fails_the_save_with_its_type(tmp_path: Path) -> None:
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}, writer=ac.Writer(restarts=0)) as ckpt:
        pid = ckpt.health().writer_pid
        os.kill(pid, signal.SIGSTOP)
        saving = ckpt.save(1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ac.WriterDiedError, match="signal 9"):
            saving.result(timeout=TIMEOUT_S)
        with pytest.raises(ac.WriterDiedError):
            ckpt.save(2).result(timeout=TIMEOUT_S)


def test_writer_killed_between_rename_and_answer_is_acknowledged_once(tmp_path: Path) -> None:
    # The step is committed by a first writer; a replacement that is sent the same save finds it.
    with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}) as ckpt:
        saving = ckpt.save(1)
        saving.result(timeout=TIMEOUT_S)
        client = ckpt._saves._client
        nonce = ckpt.checkpoints()[0].nonce
        assert saving.outcome == "durable"
        again = replay(ckpt, client, nonce)
        assert again.outcome == "durable"
        assert [info.nonce for info in ckpt.checkpoints()] == [nonce]


def replay(ckpt: ac.Checkpointer, client: object, nonce: str) -> ac.SaveFuture:
    """Send step 1 once more with the nonce of the committed one, as a restarted client does."""
    import uuid
    from unittest import mock

    ckpt._books.steps.discard(1)
    with mock.patch.object(uuid, "uuid4", return_value=uuid.UUID(nonce)):
        again = ckpt.save(1)
    again.result(timeout=TIMEOUT_S)
    return again
