"""Bit-for-bit comparison of two runs: their losses, and the tensors of their last checkpoints."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncckpt.repository import CommittedStep

__all__ = ["LossComparison", "StateComparison", "compare_losses", "compare_states"]


@dataclass(frozen=True, slots=True)
class LossComparison:
    """Steps whose losses are equal, differ or are missing; and how many were computed more than once.

    A run that was killed computes the steps after its last checkpoint again. Those must repeat
    themselves too, so all values of a step count.
    """

    num_equal: int
    different: tuple[int, ...]
    num_repeated: int

    @property
    def ok(self) -> bool:
        return self.num_equal > 0 and not self.different


@dataclass(frozen=True, slots=True)
class StateComparison:
    """Keys of files and small tensors that are equal, and that differ (or exist on one side only)."""

    num_equal: int
    different: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.num_equal > 0 and not self.different


def read_losses(path: Path) -> dict[int, list[str]]:
    """Every loss that was logged for each step, as the hexadecimal form of the float."""
    losses = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        losses[entry["step"]].append(entry["hex"])
    return dict(losses)


def compare_losses(reference: Path, resumed: Path) -> LossComparison:
    """Compare two files of losses written by the example."""
    ours, theirs = read_losses(reference), read_losses(resumed)
    steps = sorted({*ours, *theirs})
    different = tuple(step for step in steps if len({*ours.get(step, [""]), *theirs.get(step, [""])}) != 1)
    num_repeated = sum(len(values) > 1 for values in theirs.values())
    return LossComparison(len(steps) - len(different), different, num_repeated)


def compare_states(reference: CommittedStep, resumed: CommittedStep) -> StateComparison:
    """Compare all that two steps hold: files by the digests of their raw bytes, small values as they are."""
    ours, theirs = _contents(reference), _contents(resumed)
    keys = sorted({*ours, *theirs})
    absent = object()
    different = tuple(key for key in keys if ours.get(key, absent) != theirs.get(key, absent))
    return StateComparison(len(keys) - len(different), different)


def _contents(committed: CommittedStep) -> dict[str, Any]:
    files = {record.key: record.raw for record in committed.read_index()}
    return {**files, **committed.header.inline, "tree": committed.header.tree}
