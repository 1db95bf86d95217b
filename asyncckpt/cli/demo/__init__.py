"""``asyncckpt demo``: kill a training run in the middle of its saves, and lose nothing."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncckpt.cli.demo.process import DemoError, DemoSettings
from asyncckpt.cli.demo.story import Story
from asyncckpt.cli.exits import ExitCode
from asyncckpt.cli.output import print_json
from asyncckpt.errors import InvalidOptionError

__all__ = ["DemoSettings", "run"]


def run(settings: DemoSettings, folder: Path | None, *, as_json: bool) -> ExitCode:
    """Play the demo and print it.

    Raises:
        DemoError: a process failed, or no save could be cut.
        InvalidOptionError: *folder* already holds something.
    """
    if sys.platform != "linux":
        raise DemoError("the demo finds and kills processes by /proc, so it needs Linux")
    with _workspace(folder) as place:
        story = Story(settings, place, say=_say_nothing if as_json else _say)
        story.play()
    if as_json:
        print_json(story.report())
    return ExitCode.OK if story.ok else ExitCode.ERROR


def _say(message: str) -> None:
    print(message, flush=True)


def _say_nothing(_message: str) -> None:
    pass


@contextmanager
def _workspace(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="asyncckpt-demo-") as name:
            yield Path(name)
        return
    if folder.exists() and any(folder.iterdir()):
        raise InvalidOptionError(f"{folder} is not empty; name a new directory")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
