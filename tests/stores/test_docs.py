"""The examples of ``docs/testing.md`` run, and nothing in it is left out of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncckpt as ac
from asyncckpt import testing

GUIDE = Path(__file__).parents[2] / "docs" / "testing.md"


def test_the_examples_are_a_module_of_tests_that_pass(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    module = tmp_path / "test_guide.py"
    module.write_text("\n\n".join(blocks))
    # Of the suite, three tests are enough to see that the example is collected and its fixtures work.
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    chosen = ["-k", "not TestMyStore or test_read_returns_ranges or test_rename_moves"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen, str(module)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(ac.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    tests = "\n".join(blocks).count("def test_")
    assert tests == 7
    assert f"{tests + 3} passed" in done.stdout, done.stdout + done.stderr


def test_the_guide_names_everything_that_is_public() -> None:
    guide = GUIDE.read_text()
    assert [name for name in testing.__all__ if not re.search(rf"\b{name}\b", guide)] == []


def test_a_writer_that_is_a_thread_cannot_be_killed(tmp_path: Path) -> None:
    with (
        ac.Checkpointer(tmp_path, {"value": 1}, writer=ac.Writer(kind="thread")) as ckpt,
        pytest.raises(ac.InvalidOptionError, match="thread"),
    ):
        testing.kill_writer(ckpt)
