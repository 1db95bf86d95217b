"""A run that is killed and resumed ten times is, bit for bit, the run that never was interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt as ac

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt2.py"
STEPS = 36
KILL_AT = [2, 5, 8, 12, 15, 19, 22, 26, 29, 33]


def start(root: Path, losses: Path) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-u", str(EXAMPLE), "--config", "tiny", "--batch-size", "2", "--block-size", "32"),
        *("--steps", str(STEPS), "--save-every", "1", "--log-every", "1", "--device", "cpu"),
        *("--root", str(root), "--losses", str(losses)),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run_until(root: Path, losses: Path, kill_at: int | None) -> None:
    """Train; SIGKILL as soon as step *kill_at* was printed."""
    with start(root, losses) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if kill_at is not None and line.startswith(f"step {kill_at} "):
                trainer.kill()
                return
    assert trainer.returncode == 0
    assert kill_at is None, f"training ended before step {kill_at}"


def read_losses(path: Path) -> dict[int, set[str]]:
    """All values that were computed for each step; more than one run may have computed it."""
    values: dict[int, set[str]] = defaultdict(set)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        values[entry["step"]].add(entry["hex"])
    return dict(values)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in flatten(item, f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for at, item in enumerate(value) for key, leaf in flatten(item, f"{path}/{at}").items()}
    return {path: value}


def require_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Fail unless both, flattened, hold the same tensors, bit for bit, and equal values."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else str(value) == str(theirs[key])
        assert same, key


@pytest.mark.timeout(400)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run_until(calm, tmp_path / "calm.jsonl", None)
    for kill_at in [*KILL_AT, None]:
        run_until(killed, tmp_path / "killed.jsonl", kill_at)

    expected = read_losses(tmp_path / "calm.jsonl")
    assert sorted(expected) == list(range(STEPS))
    assert read_losses(tmp_path / "killed.jsonl") == expected

    ours, theirs = flatten(ac.load(calm, STEPS - 1)), flatten(ac.load(killed, STEPS - 1))
    assert sum(isinstance(value, torch.Tensor) for value in ours.values()) > 20
    require_same(ours, theirs)
