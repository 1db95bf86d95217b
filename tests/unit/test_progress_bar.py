"""What is shown on a terminal while a checkpointer is closed."""

from __future__ import annotations

import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.checkpointer import reporting
from asyncckpt.checkpointer.backlog import Backlog, PendingSave
from asyncckpt.checkpointer.progress_bar import ProgressBar
from asyncckpt.testing import Gate

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

TIMEOUT_S = 60.0


class Terminal:
    """A pseudo-terminal that stands for standard error; what it shows is read by a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ours, theirs = pty.openpty()
        self.stderr = os.fdopen(theirs, "w")
        self.shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        for name in ("NO_COLOR", "CI", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")

    def become_stderr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the test itself: pytest puts a stream of its own there after the fixtures are made."""
        monkeypatch.setattr(sys, "stderr", self.stderr)

    def _read(self) -> None:
        # OSError: the other end is closed.
        try:
            while data := os.read(self._ours, 4096):
                self.shown += data.decode()
        except OSError:
            return

    def wait_shown(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.01)

    def close(self) -> None:
        self.stderr.close()
        self._reader.join()
        os.close(self._ours)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal(monkeypatch)
    yield terminal
    terminal.close()


def test_closing_shows_a_bar_and_takes_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_gate: Gate, terminal: Terminal
) -> None:
    terminal.become_stderr(monkeypatch)
    ckpt = ac.Checkpointer(tmp_path, {"w": torch.ones(1_000_000)}, writer=ac.Writer(kind="thread"))
    ckpt.save(7).wait_staged(TIMEOUT_S)
    closing = threading.Thread(target=ckpt.close)
    closing.start()
    terminal.wait_shown("step 7")
    terminal.wait_shown("/4.0 MB")
    commit_gate.open()
    closing.join(TIMEOUT_S)
    terminal.wait_shown("\x1b[2K")  # the line is erased


def test_without_rich_it_is_log_lines(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    terminal.become_stderr(monkeypatch)
    assert isinstance(reporting.open_reporter(), ProgressBar)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert isinstance(reporting.open_reporter(), reporting.LogLines)


@pytest.mark.parametrize("stderr", [None, "closed", "file"])
def test_without_a_terminal_it_is_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    with (tmp_path / "stderr").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file if stderr else None)
        if stderr == "closed":
            file.close()
        assert isinstance(reporting.open_reporter(), reporting.LogLines)


def test_a_short_wait_shows_nothing_and_saves_come_and_go(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    terminal.become_stderr(monkeypatch)
    now = 0.0
    bar = ProgressBar(lambda: now)
    bar.update(Backlog((PendingSave(1, 1000, 10),)))
    now = 0.9
    bar.update(Backlog((PendingSave(1, 1000, 20),)))
    terminal.stderr.flush()
    assert terminal.shown == ""
    now = 1.0
    bar.update(Backlog((PendingSave(1, 2_000_000, 500_000), PendingSave(2, 0, 0)), 1_000_000.0))
    terminal.wait_shown("0.5/2.0 MB")
    terminal.wait_shown("1.0 MB/s, 1.50 s to go")
    bar.update(Backlog((PendingSave(2, 1000, 0),)))
    terminal.wait_shown("durable")
    bar.close()
