"""Bugs planted in a copy of the package, to see whether the harness notices.

A mutant is a change of source text, so that each single flush, check and order can be broken where it
stands. Text that is not found exactly once is an error: the code has moved on, and so must the mutant.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncckpt
from crashstates.campaign import explore, load_history
from crashstates.trace import record

__all__ = ["Mutant", "MutantResult", "run_mutant"]

BOTH = ("syncfs", "each")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted bug.

    Attributes:
        edits: file of the package, old text, which is there exactly once, and new text.
        scenario: of `program`.
        flushes: modes in which the bug must show.
        judged_by: ``"states"``: the mutated program is recorded, and its crash states are checked with the
            real package. ``"recovery"``: the mutated package looks at the crash states of the real program.
            ``"damage"``: the mutated package looks at damaged steps.
        equivalent: why no promise depends on it, for changes that are no bugs; the harness must stay silent.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    scenario: str = "direct"
    flushes: tuple[str, ...] = BOTH
    judged_by: str = "states"
    equivalent: str = ""


@dataclass(frozen=True, slots=True)
class MutantResult:
    """How one mutant fared in one flush mode; *evidence* is the first broken promise."""

    mutant: Mutant
    flush: str
    evidence: str | None

    @property
    def as_expected(self) -> bool:
        return (self.evidence is None) == bool(self.mutant.equivalent)

    def describe(self) -> str:
        return f"{self.mutant.name} [{self.flush}]: {self.evidence or 'not noticed'}"


def run_mutant(
    mutant: Mutant, flush: str, workspace: Path, budget: int, real_trace: Callable[[str, str], Path]
) -> MutantResult:
    """Plant *mutant* and look for a broken promise.

    Args:
        workspace: a new directory.
        budget: of crash states; only mutants that are not caught use it up.
        real_trace: records a scenario in a flush mode with the real package.
    """
    package = workspace / "package"
    _plant(mutant, package)
    if mutant.judged_by == "states":
        trace = record(mutant.scenario, flush, workspace / "run", package)
        violations = explore(load_history(trace), budget, stop_at_first=True).violations
    else:
        what = "damage" if mutant.judged_by == "damage" else "states"
        violations = _ask_mutated(package, what, real_trace(mutant.scenario, flush), budget)
    shutil.rmtree(workspace)
    return MutantResult(mutant, flush, violations[0] if violations else None)


def _plant(mutant: Mutant, package: Path) -> None:
    source = Path(asyncckpt.__file__).parent
    shutil.copytree(source, package / "asyncckpt", ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in mutant.edits:
        path = package / "asyncckpt" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"mutant {mutant.name!r} no longer fits {file}, update it: {old!r} is not there once")
        path.write_text(text.replace(old, new))


def _ask_mutated(package: Path, what: str, trace: Path, budget: int) -> list[str]:
    path = os.pathsep.join([str(package), str(Path(__file__).parent.parent)])
    result = subprocess.run(
        [sys.executable, "-m", "crashstates", what, str(trace), str(budget)],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=package,  # where ``-m`` looks first
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the check with a mutated package failed: {result.stderr[-2000:]}")
    violations: list[str] = json.loads(result.stdout)
    return violations
