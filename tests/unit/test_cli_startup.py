"""The light verbs start at once, and end well when nobody reads on."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

START_S = 0.3


def cpu_s(command: list[str]) -> float:
    """CPU seconds of one run: wall time on a busy machine measures the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("verb", ["ls", "show", "verify", "run"])
def test_light_verbs_start_in_less_than_300_ms(tmp_path: Path, verb: str) -> None:
    command = [sys.executable, "-m", "asyncckpt", verb, str(tmp_path)]  # `run` says that it cannot run a directory
    # Cores that are shared with others make a run dearer, never cheaper: one run below is the proof.
    assert any(cpu_s(command) < START_S for _ in range(10))


def test_a_closed_pipe_is_no_complaint() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as nobody_reads:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "asyncckpt", "ls", "--help"], stdout=nobody_reads, stderr=subprocess.PIPE
        )
    # click itself ends with 1 when its own help cannot be printed.
    assert done.returncode in (0, 1)
    assert done.stderr == b""
