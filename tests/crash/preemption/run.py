"""Tells trainers to stop at random moments, and holds what they leave against what was promised.

    python tests/crash/preemption/run.py --signals 200

Exit code 1 when a step was lost, anything torn, a process left, or a trainer did not leave in time. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
REPOSITORY = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "crash" / "soak")]

MOMENTS = ("start", "training", "save")
_NEWS_TIMEOUT_S = 60.0


class Campaign:
    """Lives in one root, one after the other. What must not happen is in ``violations``, in words."""

    def __init__(self, directory: Path, seed: int) -> None:
        from content import Content
        from journal import Journal, JournalReader

        self._root = directory / "root"
        self._rng = random.Random(seed)
        self._content = Content()
        self._journal = Journal(directory / "journal")
        self._reader = JournalReader(directory / "journal")
        self._last: dict[str, int] = {}
        self.num_signals = 0
        self.moments: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.violations: list[str] = []
        self.slowest_exit_s = 0.0
        self.most_lost_steps = 0

    def run(self, signals: int, seconds: float) -> None:
        """Go on until that many signals or seconds."""
        started = time.monotonic()
        while self.num_signals < signals and time.monotonic() - started < seconds:
            self._run_life()

    def _run_life(self) -> None:
        from procs import fork, reap_all
        from told_trainer import GRACE_S, live

        before = max(self._last.get("trained", -1), self._last.get("restored", -1))
        self._last = {}
        trainer = fork(lambda: live(self._root, self._journal, self._content))
        moment, is_twice, to_group = self._rng.choice(MOMENTS), self._rng.random() < 0.25, self._rng.random() < 0.7
        self._wait(moment)
        sent = time.monotonic()
        self._send(trainer, to_group)
        if is_twice:
            time.sleep(self._rng.uniform(0, 0.1))
            self._send(trainer, to_group)
        code = os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1])
        exit_s = time.monotonic() - sent
        codes, left = reap_all(60.0)
        self._read()
        self.num_signals += 1
        self.moments[moment + (" twice" if is_twice else "")] += 1
        # Before the checkpointer was made nobody handles the signal.
        end = next((event for event in ("stopped", "bereaved") if event in self._last), "other")
        end = "killed before" if code == -signal.SIGTERM else end
        self.ends[end] += 1
        self.slowest_exit_s = max(self.slowest_exit_s, exit_s)
        self._require(end != "other", f"exit {code}")
        self._require(end != "killed before" or "trained" not in self._last, f"{end} in training")
        self._require(exit_s < GRACE_S, f"left after {exit_s:.1f} s")
        self._require(not left and not any(codes.values()), f"processes left or failed: {left} {codes}")
        self._check_root(before)

    def _check_root(self, before: int) -> None:
        from audit import audit_root, is_unlocked, num_partials
        from told_trainer import SAVE_EVERY

        audit = audit_root(self._root, self._content, everything=False)
        newest = max(audit.steps, default=-1)
        lost = max(self._last.get("trained", -1), before) - newest
        self.most_lost_steps = max(self.most_lost_steps, lost)
        # Torch ends the loop of who lost a worker in its first moments: what was staged is all there is then.
        allowed = SAVE_EVERY if "bereaved" in self._last and "stopped" not in self._last else 1
        self._require(lost <= allowed, f"{lost} steps are lost; there are {audit.steps}")
        self._require("stopped" not in self._last or newest == self._last["stopped"], "the last step is not there")
        self._require(not audit.torn, f"torn: {audit.torn}")
        self._require(is_unlocked(self._root), "the root is locked")
        self._require(num_partials(self._root) == 0, "partial steps are left")

    def _send(self, trainer: int, to_group: bool) -> None:
        # ESRCH: it has not made its group yet.
        try:
            os.killpg(trainer, signal.SIGTERM) if to_group else os.kill(trainer, signal.SIGTERM)
        except ProcessLookupError:
            os.kill(trainer, signal.SIGTERM)

    def _wait(self, moment: str) -> None:
        if moment == "start":  # making the checkpointer, restoring, forking the workers
            time.sleep(self._rng.uniform(0, 0.8))
            return
        enough = self._rng.randrange(1, 6)
        deadline = time.monotonic() + _NEWS_TIMEOUT_S
        count = 0
        while count < enough and time.monotonic() < deadline:
            time.sleep(0.002)
            steps = self._read()
            # Every third step is saved.
            count += sum(moment == "training" or step % 3 == 0 for step in steps)
        time.sleep(self._rng.uniform(0, 0.05))

    def _read(self) -> list[int]:
        """Take the news in; the steps that were trained."""
        notes = self._reader.read()
        for note in notes:
            self._last[note.event] = note.number
            self._require(note.event != "error", note.detail)
            self._require(note.event != "restored" or note.detail == "''", f"restored {note.number}: {note.detail}")
        return [note.number for note in notes if note.event == "trained"]

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            self.violations.append(f"signal {self.num_signals}: {what}")

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "num_signals": self.num_signals,
            "moments": dict(self.moments),
            "ends": dict(self.ends),
            "slowest_exit_s": round(self.slowest_exit_s, 2),
            "most_lost_steps": self.most_lost_steps,
            "violations": self.violations,
        }


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=200, help="end after so many")
    parser.add_argument("--minutes", type=float, default=30.0, help="or after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", help="where the checkpoints go; default: the directory for temporary files")
    parser.add_argument("--results", type=Path, help="write a summary with facts about the machine here")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import told_trainer  # noqa: F401  once, instead of after each fork
    from common import machine_facts
    from procs import adopt_orphans

    import asyncckpt as ac

    for name in ac.__all__:
        getattr(ac, name)
    adopt_orphans()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="asyncckpt-preemption-", dir=arguments.directory) as directory:
        campaign = Campaign(Path(directory), arguments.seed)
        campaign.run(arguments.signals, arguments.minutes * 60)
        seconds = round(time.monotonic() - started, 1)
        result: dict[str, Any] = {"seed": arguments.seed, **campaign.as_dict(), "seconds": seconds}
        if arguments.results:
            facts = machine_facts(Path(directory))
            arguments.results.write_text(json.dumps({**result, "machine": facts}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
