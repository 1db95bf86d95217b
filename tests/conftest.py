"""Options and fixtures of the whole suite."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import asyncckpt as ac
from tests.event_log import EventLog

CLOSE_TIMEOUT_S = 60

# The same examples in every run, and no limit on the time of one: other programs share the machine.
settings.register_profile("asyncckpt", derandomize=True, deadline=None, database=None)
settings.load_profile("asyncckpt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="run the fault campaigns at every point instead of a sample (an hour or more)",
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether campaigns cover every point; CI takes a fixed sample of them."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def events() -> EventLog:
    """To be given to a checkpointer as ``on_event``."""
    return EventLog()


@pytest.fixture
def nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the checkpointers that a test leaves open when it fails, or their signal handlers would fail others."""
    init = ac.Checkpointer.__init__
    with ExitStack() as stack:

        def note(checkpointer: ac.Checkpointer, *arguments: Any, **options: Any) -> None:
            init(checkpointer, *arguments, **options)
            stack.callback(checkpointer.close, CLOSE_TIMEOUT_S)

        monkeypatch.setattr(ac.Checkpointer, "__init__", note)
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own: it may be filled, frozen and remounted."""
    image, point = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(256 * 2**20)
    point.mkdir()
    for command in (["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(point)]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"{command[0]} is not possible here")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=60)
