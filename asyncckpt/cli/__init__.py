"""Command line: ``ls``, ``show``, ``verify``, ``run``, ``demo``; see `asyncckpt.cli.app`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from asyncckpt.cli.exits import ExitCode

__all__ = ["main"]

_MISSING_EXTRA = """\
The command line needs the packages of its extra, and {missing} is not installed:
    pip install 'asyncckpt[cli]'
"""


def main() -> None:
    """Run the command line on ``sys.argv``; always ends by `SystemExit` with an `ExitCode`."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.stderr.write(_MISSING_EXTRA.format(missing=" and ".join(missing)))
        sys.exit(ExitCode.ERROR)
    from asyncckpt.cli.app import app

    try:
        app(prog_name="asyncckpt")
    except BrokenPipeError:
        # `asyncckpt ls | head` is no error; the interpreter would still complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
