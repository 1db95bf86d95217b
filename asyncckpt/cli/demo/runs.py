"""Runs of the trainer: one to the end, or one that is killed in the middle of a save."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from asyncckpt.cli.demo.process import DemoError, DemoSettings, TrainerProcess
from asyncckpt.format.paths import step_name

__all__ = ["Cut", "Run", "Say", "cut_save", "partial_bytes", "run_to_end", "wait_committed"]

Say = Callable[[str], None]

_STAGED = re.compile(r"save (\d+) staged: blocked ([\d.]+) ms")
_DURABLE = re.compile(r"save (\d+) durable after ([\d.]+) s: ([\d.]+) MB stored as ([\d.]+) MB")
_RESUMED = re.compile(r"resumed after step (\d+)")
_WRITER_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Run:
    """What one trainer printed.

    Attributes:
        resumed_after: the step it went on from; ``None`` when it started from scratch.
        blocked_ms: per save, how long ``save()`` kept the training loop.
        durable_s: per save, from ``save()`` until it was acknowledged.
        raw_mb: tensors of one save.
        stored_mb: files of one save.
    """

    resumed_after: int | None = None
    blocked_ms: list[float] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)
    raw_mb: float = 0.0
    stored_mb: float = 0.0

    def read(self, line: str) -> int | None:
        """Take in one line; returns the step when it says that a save was staged."""
        if found := _STAGED.match(line):
            self.blocked_ms.append(float(found[2]))
            return int(found[1])
        if found := _DURABLE.match(line):
            self.durable_s.append(float(found[2]))
            self.raw_mb, self.stored_mb = float(found[3]), float(found[4])
        elif found := _RESUMED.match(line):
            self.resumed_after = int(found[1])
        return None


@dataclass(frozen=True, slots=True)
class Cut:
    """A run that was killed in the middle of a save.

    Attributes:
        run: what it printed until then.
        step: the save that was under way: staged, not acknowledged, not committed.
        writer: pid of its writer process.
    """

    run: Run
    step: int
    writer: int


def run_to_end(settings: DemoSettings, root: Path, losses: Path, say: Say) -> Run:
    """Train until the last step and return what was seen."""
    run = Run()
    with TrainerProcess(settings, root, losses) as trainer:
        for line in trainer.lines():
            run.read(line)
            if line.startswith(("step ", "resumed ")):
                say(f"   {line}")
        trainer.wait_success()
    return run


def cut_save(settings: DemoSettings, root: Path, losses: Path, *, first_step: int, with_writer: bool) -> Cut:
    """Train, and kill the process in the middle of the first save at or after *first_step*.

    In the middle means: the snapshot was staged, and after the kill no such step was committed. A save
    that was faster than the kill proves nothing; training is resumed and the next one is tried.

    Args:
        settings: what to train.
        root: checkpoint root.
        losses: file of the losses.
        first_step: earlier saves are left alone.
        with_writer: kill the writer process too.

    Raises:
        DemoError: training ended before a save could be cut.
    """
    while True:
        run = Run()
        with TrainerProcess(settings, root, losses) as trainer:
            for line in trainer.lines():
                step = run.read(line)
                if step is None or step < first_step:
                    continue
                writer = trainer.kill(with_writer=with_writer)
                if writer is not None and not (root / step_name(step)).exists():
                    return Cut(run, step, writer)
                first_step = step + 1
                break
            else:
                trainer.wait_success()
                raise DemoError("every save was durable before the kill arrived; try a larger --config")


def wait_committed(root: Path, step: int) -> float:
    """Wait until *step* is committed; returns the seconds it took.

    Raises:
        DemoError: it took longer than two minutes.
    """
    started = time.monotonic()
    while not (root / step_name(step)).exists():
        if time.monotonic() - started > _WRITER_TIMEOUT_S:
            raise DemoError(f"the writer did not commit step {step} although it was staged")
        time.sleep(0.01)
    return time.monotonic() - started


def partial_bytes(root: Path) -> int:
    """Bytes of files that were never committed."""
    return sum(path.stat().st_size for path in (root / ".asyncckpt" / "partial").rglob("*") if path.is_file())
