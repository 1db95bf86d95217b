"""The writer's log reaches the trainer's, and a standard error that nobody reads stops nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

import asyncckpt as ac
from asyncckpt.writer.logs import LogBuffer, hand_on, wanted_level
from asyncckpt.writer.messages import LogRecord

NAME = "asyncckpt.writer"


def record(text: str, *arguments: object, name: str = NAME, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, text, arguments, None)


def messages(records: list[LogRecord]) -> list[str]:
    return [found.message for found in records]


DEBUG_ARRIVED = threading.Event()


class Collector(logging.Handler):
    """Keeps every record it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        if record.levelno == logging.DEBUG:
            DEBUG_ARRIVED.set()


@pytest.fixture
def collected() -> Iterator[list[logging.LogRecord]]:
    """What arrives at the package's logger, of whatever level; its configuration is put back."""
    logger, collector = logging.getLogger("asyncckpt"), Collector()
    DEBUG_ARRIVED.clear()
    before = logger.level, list(logger.handlers), logger.propagate
    logger.addHandler(collector)
    yield collector.records
    logger.setLevel(before[0])
    logger.handlers[:], logger.propagate = before[1:]


def test_records_are_taken_once_and_in_order() -> None:
    buffer, sent = LogBuffer(), [record("number %d", number) for number in range(3)]
    for one in sent:
        buffer.emit(one)
    expected = [LogRecord(logging.WARNING, f"number {at}", NAME, sent[at].created) for at in range(3)]
    assert buffer.take() == expected
    assert buffer.take() == []


def test_a_flood_is_bounded_and_what_was_left_out_is_told() -> None:
    buffer = LogBuffer()
    for number in range(5000):
        buffer.emit(record("number %d", number))
    notice, *kept = messages(buffer.take())
    assert notice == "4000 messages of the writer before this one were too many to be kept"
    assert kept == [f"number {number}" for number in range(4000, 5000)]
    buffer.emit(record("calm again"))
    assert messages(buffer.take()) == ["calm again"]


def test_a_message_of_any_length_is_bounded() -> None:
    buffer = LogBuffer()
    buffer.emit(record("x" * 1_000_000))
    (found,) = messages(buffer.take())
    assert found == "x" * 10_000 + "... (1000000 characters)"


def test_what_cannot_be_formatted_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    buffer = LogBuffer()
    buffer.emit(record("%d", "no number"))
    buffer.emit(record("fine"))
    assert messages(buffer.take()) == ["fine"]


def test_a_record_is_handled_by_the_logger_of_its_name_as_the_writer_made_it(
    collected: list[logging.LogRecord],
) -> None:
    hand_on(LogRecord(logging.ERROR, "100 % full", "asyncckpt.repository", 1e9 + 0.25), pid=4711)
    (found,) = collected
    assert (found.name, found.levelname, found.getMessage()) == ("asyncckpt.repository", "ERROR", "100 % full")
    assert (found.created, found.msecs, found.process) == (1e9 + 0.25, 250, 4711)


def test_the_level_of_the_trainer_decides_what_is_heard(collected: list[logging.LogRecord]) -> None:
    logging.getLogger("asyncckpt").setLevel(logging.ERROR)
    hand_on(LogRecord(logging.WARNING, "not wanted", NAME, 0.0), pid=1)
    assert collected == []
    assert wanted_level() == logging.ERROR
    logging.getLogger("asyncckpt").setLevel(logging.DEBUG)
    hand_on(LogRecord(logging.DEBUG, "wanted", NAME, 0.0), pid=1)
    assert [found.getMessage() for found in collected] == ["wanted"]
    assert wanted_level() == logging.DEBUG


def test_a_level_set_while_training_reaches_the_writer_with_the_next_save(
    tmp_path: Path, collected: list[logging.LogRecord]
) -> None:
    # A directory where the partial step should be makes the save fail, which the writer logs at DEBUG.
    logger = logging.getLogger("asyncckpt")
    logger.setLevel(logging.WARNING)

    def told() -> list[str]:
        return [found.getMessage().splitlines()[0] for found in collected if found.levelno == logging.DEBUG]

    with ac.Checkpointer(tmp_path, {"w": torch.ones(1000)}, writer=ac.Writer(on_error="warn")) as ckpt:
        writer = ckpt.health().writer_pid
        partial = tmp_path / ".asyncckpt" / "partial"
        partial.rmdir()
        partial.write_bytes(b"")
        assert ckpt.save(1).exception(60) is not None
        logger.setLevel(logging.DEBUG)
        assert ckpt.save(2).exception(60) is not None
        assert DEBUG_ARRIVED.wait(60)  # it is sent after the answer, and judged by the level when it arrives
        logger.setLevel(logging.WARNING)
        assert ckpt.save(3).exception(60) is not None
        partial.unlink()
        partial.mkdir()
        ckpt.save(4).result(60)
    assert told() == ["step 2 failed"]
    debug = next(found for found in collected if found.levelno == logging.DEBUG)
    assert (debug.name, debug.process) == (NAME, writer)
    assert "Traceback" in debug.getMessage()


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_handlers_and_filters_that_raise_hurt_no_save(
    tmp_path: Path,
    kind: Literal["process", "thread"],
    monkeypatch: pytest.MonkeyPatch,
    collected: list[logging.LogRecord],
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("a handler of the user's")

    logging.getLogger("asyncckpt").addHandler(Broken())
    logging.getLogger("asyncckpt").setLevel(logging.DEBUG)
    with ac.Checkpointer(tmp_path, {"w": torch.ones(1000)}, writer=ac.Writer(kind=kind)) as ckpt:
        ckpt.save(1).result(60)
        ckpt.save(2).result(60)
        ckpt.save(3, {"w": torch.ones(3)}, metrics={"x": 1.0}).result(60)
    assert [info.step for info in ac.open(tmp_path).checkpoints()] == [1, 2, 3]
    assert any("durable" in found.getMessage() for found in collected)


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
