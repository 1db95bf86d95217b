"""Events as JSON lines: whole lines whatever other processes and the disk do, and never an error for training."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import asyncckpt as ac


def event(step: int, **fields: Any) -> ac.Event:
    return ac.Event("save.durable", step, 1e9 + 0.5, fields)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond *num_bytes*: a write there is cut, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_event_is_a_line_at_once_and_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = ac.JsonLines(path)
    lines(event(1, durable_s=2.5, ratio=float("nan"), fell_back_from=[3, 2], text="zeile\n1", none=None))
    assert read(path) == [
        {
            "time": 1e9 + 0.5,
            "event": "save.durable",
            "step": 1,
            "durable_s": 2.5,
            "ratio": "nan",
            "fell_back_from": [3, 2],
            "text": "zeile\n1",
            "none": None,
        }
    ]
    lines(event(2))
    assert [line["step"] for line in read(path)] == [1, 2]
    lines.close()
    lines.close()
    lines(event(3))
    assert len(read(path)) == 2


def test_a_later_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in (1, 2):
        lines = ac.JsonLines(path)
        lines(event(step))
        lines.close()
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1}\n{"ti')
    ac.JsonLines(path)(event(5))
    assert path.read_text().splitlines()[1] == '{"ti'
    assert json.loads(path.read_text().splitlines()[2])["step"] == 5


def test_a_full_disk_costs_lines_but_no_exception_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"
    lines = ac.JsonLines(path)
    lines(event(1))
    with caplog.at_level(logging.WARNING, logger="asyncckpt"):
        with file_size_limit(path.stat().st_size + 10):
            for step in (2, 3, 4):
                lines(event(step))
        assert lines.num_lost == 3
        assert [record.getMessage()[:27] for record in caplog.records] == ["events cannot be written to"]
        lines(event(5))
    assert caplog.records[-1].getMessage() == f"events are written to {path} again; 3 were lost"
    first, cut, last = path.read_text().splitlines()
    assert json.loads(first)["step"] == 1
    assert len(cut) == 10
    assert json.loads(last)["step"] == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_full_from_the_start_is_no_reason_not_to_train(tmp_path: Path) -> None:
    lines = ac.JsonLines("/dev/full")
    with ac.Checkpointer(tmp_path, on_event=lines, writer=ac.Writer(kind="thread")) as ckpt:
        ckpt.save(1, {"x": 1}).result(60)
    assert lines.num_lost >= 4


@pytest.mark.parametrize("path", ["no/such/directory/x.jsonl", "."])
def test_a_path_that_cannot_be_a_file_is_told_at_once(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ac.InvalidOptionError, match="events cannot be written"):
        ac.JsonLines(path)


def test_forked_children_and_their_parent_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    script = f"""
import os, signal
import asyncckpt as ac
lines = ac.JsonLines({str(path)!r})
lines(ac.Event("before", 0))
children = []
for child in range(4):
    pid = os.fork()
    if pid == 0:
        for number in range(300):
            lines(ac.Event("child", number, fields={{"child": child, "text": "x" * 500}}))
        os.kill(os.getpid(), signal.SIGKILL)  # nothing is left in a buffer
    children.append(pid)
for number in range(300):
    lines(ac.Event("parent", number))
for pid in children:
    os.waitpid(pid, 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    written = read(path)
    assert [line["event"] for line in written].count("before") == 1
    assert [line["step"] for line in written if line["event"] == "parent"] == list(range(300))
    for child in range(4):
        assert [line["step"] for line in written if line.get("child") == child] == list(range(300))
