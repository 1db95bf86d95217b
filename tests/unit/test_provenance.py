"""The record of where a run comes from: plain values, no secrets, and never an error."""

from __future__ import annotations

import argparse
import enum
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import asyncckpt as ac


class Mode(enum.Enum):
    FAST = 1


@dataclass
class Inner:
    width: int = 3
    mode: Mode = Mode.FAST


@dataclass
class Config:
    lr: float = 0.1
    inner: Inner = field(default_factory=Inner)
    data: Path = Path("a/b")
    api_key: str = "sk-123"
    pad_token: str = "<pad>"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (None, None),
        (
            Config(),
            {
                "lr": 0.1,
                "inner": {"width": 3, "mode": "FAST"},
                "data": "a/b",
                "api_key": "(hidden)",
                "pad_token": "<pad>",
            },
        ),
        (argparse.Namespace(x=1, hf_token="t", password=""), {"x": 1, "hf_token": "(hidden)", "password": ""}),
        (SimpleNamespace(y=(1, {2})), {"y": [1, [2]]}),
        ({"f": np.float64(0.5), "act": json.dumps, 3: True}, {"f": 0.5, "act": "json.dumps", "3": True}),
        ({"x": Broken()}, {"x": "(Broken that cannot be described: RuntimeError)"}),
    ],
)
def test_configurations_become_plain_values(config: Any, plain: Any) -> None:
    assert ac.run_metadata(config)["config"] == plain


def test_a_configuration_that_contains_itself_ends() -> None:
    config: dict[str, Any] = {}
    config["self"] = config
    json.dumps(ac.run_metadata(config))


def test_the_command_line_is_recorded_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["t.py", "--lr", "1", "--api-key", "s1", "--hf_token=s2", "password=s3", "--secret"]
    )
    assert ac.run_metadata()["argv"] == [
        *("t.py", "--lr", "1", "--api-key", "(hidden)", "--hf_token=(hidden)", "password=(hidden)", "--secret")
    ]


def test_the_environment_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SETTING", "from-the-environment")
    assert "from-the-environment" not in json.dumps(ac.run_metadata({}, note="x"))
    assert ac.run_metadata(note="x")["note"] == "x"


def recorded_git(script: Path) -> Any:
    """What a script at *script* records, run from elsewhere."""
    script.write_text("import json, asyncckpt as ac\nprint(json.dumps(ac.run_metadata()['git']))\n")
    command = [sys.executable, str(script)]
    package = str(Path(ac.__file__).parents[1])
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "PYTHONPATH": package}
    )
    return json.loads(ended.stdout)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_script_is_recorded(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    script, other = tmp_path / "train.py", tmp_path / "other.py"
    git("init", "-b", "main")
    assert recorded_git(script) is None  # no commit yet
    other.write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert recorded_git(script) == {"commit": commit, "branch": "main", "dirty": False}
    other.write_text("2")
    git("checkout", "--detach")
    assert recorded_git(script) == {"commit": commit, "branch": None, "dirty": True}


def test_without_git_or_a_repository_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ac.run_metadata()["git"] is None
