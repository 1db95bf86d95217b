"""The demo's plot: an uninterrupted run, the same run killed twice in the middle of a save, and the comparison."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncckpt.cli.demo.compare import compare_losses, compare_states
from asyncckpt.cli.demo.process import DemoSettings
from asyncckpt.cli.demo.runs import Run, Say, cut_save, partial_bytes, run_to_end, wait_committed
from asyncckpt.cli.output import format_bytes
from asyncckpt.repository import Catalog, CommittedStep
from asyncckpt.stores import open_store

__all__ = ["Check", "Story"]


@dataclass(frozen=True, slots=True)
class Check:
    """One promise that the demo puts to the test, and how it went."""

    promise: str
    ok: bool
    seen: str


class Story:
    """One play of the demo in a directory of its own.

    Args:
        settings: what to train.
        place: an empty directory.
        say: takes each line of the story.
    """

    def __init__(self, settings: DemoSettings, place: Path, *, say: Say) -> None:
        self.checks: list[Check] = []
        self.seconds = 0.0
        self._settings = settings
        self._calm, self._calm_losses = place / "uninterrupted", place / "uninterrupted.jsonl"
        self._root, self._losses = place / "killed", place / "killed.jsonl"
        self._say = say

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def report(self) -> dict[str, Any]:
        """The outcome as a JSON document."""
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 2),
            "settings": asdict(self._settings),
            "checks": [asdict(check) for check in self.checks],
        }

    def play(self) -> None:
        """Run everything; each promise becomes a `Check`.

        Raises:
            DemoError: a process failed, or no save could be cut.
        """
        started = time.monotonic()
        self._run_uninterrupted()
        orphaned = self._kill_trainer()
        torn = self._kill_trainer_and_writer(orphaned)
        self._finish(torn)
        self._compare()
        self.seconds = time.monotonic() - started
        verdict = "every promise held" if self.ok else "A PROMISE WAS BROKEN"
        self._say(f"\n{verdict}; {self.seconds:.0f} s")

    def _check(self, promise: str, ok: bool, seen: str) -> None:
        self.checks.append(Check(promise, ok, seen))
        self._say(f"   {'ok    ' if ok else 'FAILED'} {promise}: {seen}")

    def _run_uninterrupted(self) -> None:
        settings = self._settings
        self._say(
            f"A GPT-2 ({settings.config}) trains for {settings.steps} steps on {len(os.sched_getaffinity(0))} CPUs and"
            f" saves every {settings.save_every}.\n\n1. Without interruption"
        )
        run = run_to_end(settings, self._calm, self._calm_losses, self._say)
        self._say(f"   {_costs(run)}")

    def _kill_trainer(self) -> int:
        self._say("\n2. The same again, in a new process; SIGKILL to it in the middle of a save")
        cut = cut_save(
            self._settings, self._root, self._losses, first_step=self._settings.steps // 3, with_writer=False
        )
        self._say(f"   save {cut.step} was staged and not yet committed when the trainer died")
        waited_s = wait_committed(self._root, cut.step)
        self._check(
            "a staged save outlives its trainer",
            ok=True,
            seen=f"writer process {cut.writer} committed step {cut.step} on its own, {waited_s:.2f} s after the kill",
        )
        return cut.step

    def _kill_trainer_and_writer(self, orphaned: int) -> int:
        self._say("\n3. Resumed in a new process; SIGKILL to trainer and writer together in the middle of a save")
        first_step = orphaned + self._settings.steps // 4
        cut = cut_save(self._settings, self._root, self._losses, first_step=first_step, with_writer=True)
        resumed = cut.run.resumed_after
        self._check(
            "nothing acknowledged is lost",
            ok=resumed is not None and resumed >= orphaned,
            seen=f"the new process went on after step {resumed}",
        )
        self._say(
            f"   save {cut.step} was staged and not committed when both died:"
            f" {format_bytes(partial_bytes(self._root))} of it are left, uncommitted"
        )
        return cut.step

    def _finish(self, torn: int) -> None:
        newest = max(Catalog(open_store(str(self._root))).steps())
        self._say("\n4. Resumed once more, to the end")
        run = run_to_end(self._settings, self._root, self._losses, self._say)
        left_bytes = partial_bytes(self._root)
        self._check(
            "nothing torn is offered",
            ok=run.resumed_after == newest < torn and left_bytes == 0,
            seen=f"went on after step {run.resumed_after}, not {torn}; {left_bytes} bytes left of the torn save",
        )

    def _compare(self) -> None:
        self._say("\n5. Compared")
        losses = compare_losses(self._calm_losses, self._losses)
        self._check(
            "losses are equal bit for bit",
            losses.ok and losses.num_equal == self._settings.steps,
            f"{losses.num_equal} of {self._settings.steps} steps, {losses.num_repeated} of them computed twice"
            + (f"; different: {losses.different}" if losses.different else ""),
        )
        states = compare_states(_last_step(self._calm), _last_step(self._root))
        self._check(
            "the last checkpoints are equal bit for bit",
            states.ok,
            f"{states.num_equal} files and values: parameters, moments, schedule, random generators, data position"
            + (f"; different: {', '.join(states.different)}" if states.different else ""),
        )


def _last_step(root: Path) -> CommittedStep:
    return Catalog(open_store(str(root))).find("latest")


def _costs(run: Run) -> str:
    return (
        f"{len(run.durable_s)} saves of {run.raw_mb:.1f} MB (stored as {run.stored_mb:.1f} MB): blocked"
        f" {statistics.median(run.blocked_ms):.1f} ms, durable after {statistics.median(run.durable_s):.2f} s (medians)"
    )
