"""The writer's log reaches the trainer's, and a standard error that nobody reads stops nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from asyncckpt.writer.logs import LogBuffer
from asyncckpt.writer.messages import LogRecord


def record(text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("asyncckpt", logging.WARNING, __file__, 1, text, arguments, None)


def test_records_are_taken_once_and_in_order() -> None:
    buffer = LogBuffer()
    for number in range(3):
        buffer.emit(record("number %d", number))
    assert buffer.take() == [LogRecord(logging.WARNING, f"number {number}") for number in range(3)]
    assert buffer.take() == []


def test_what_nobody_takes_is_bounded() -> None:
    buffer = LogBuffer()
    for number in range(5000):
        buffer.emit(record("number %d", number))
    taken = buffer.take()
    assert len(taken) == 1000
    assert taken[-1].message == "number 4999"


def test_what_cannot_be_formatted_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    buffer = LogBuffer()
    buffer.emit(record("%d", "no number"))
    buffer.emit(record("fine"))
    assert [found.message for found in buffer.take()] == ["fine"]


def test_the_writer_logs_through_the_trainer_and_never_to_its_standard_error(tmp_path: Path) -> None:
    # A directory of steps that cannot be removed makes retention fail, which is worth a warning, after each save.
    script = textwrap.dedent(f"""
        import logging, os, sys, torch
        import asyncckpt as ac
        logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s", level=logging.WARNING)
        with ac.Checkpointer({str(tmp_path)!r}, {{"w": torch.ones(1000)}}, keep=ac.Keep(last=1)) as ckpt:
            path = ckpt.save(1).result(60).path
            os.remove(path + "/state/w/c.0")
            os.mkfifo(path + "/state/w/c.0")
            os.system(f"mount -t tmpfs none {{path}}/index")
            ckpt.save(2).result(60)
            ckpt.wait(60)
        os.system(f"umount {{path}}/index 2>/dev/null")
    """)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    if "mount" in ended.stderr:
        pytest.skip("mounting is not allowed here")
    assert "asyncckpt.writer WARNING retention failed" in ended.stdout
    assert ended.stderr == ""
