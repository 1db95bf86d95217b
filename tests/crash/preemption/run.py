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
from typing import TYPE_CHECKING, Any

os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
REPOSITORY = Path(__file__).resolve().parents[3]
PATHS = [REPOSITORY, REPOSITORY / "benchmarks", REPOSITORY / "examples", REPOSITORY / "tests" / "crash" / "soak"]
sys.path[:0] = [str(path) for path in PATHS]

if TYPE_CHECKING:
    from told import Life
    from tracks import Track

MOMENTS = ("start", "restore", "step", "save")
_NEWS_TIMEOUT_S = 120.0
_LEAVE_NOW_SHARE = 0.08


class Campaign:
    """Lives, one after the other. What must not happen is in ``violations``, in words."""

    def __init__(
        self, tracks: dict[str, tuple[Track, int]], seed: int, grace_s: float, *, is_fork_shielded: bool
    ) -> None:
        self._tracks = tracks
        self._rng = random.Random(seed)
        self._grace_s = grace_s
        self._is_fork_shielded = is_fork_shielded
        self._decks: dict[str, list[str]] = {"": []}
        self.num_lives = 0
        self.counts: dict[str, Counter[str]] = {"trainings": Counter(), "moments": Counter(), "ends": Counter()}
        self.violations: list[str] = []
        self.slowest_exit_s = 0.0
        self.lost_steps: Counter[int] = Counter()
        self.lost_steps_when_leaving_now: Counter[int] = Counter()

    def run(self, signals: int, seconds: float) -> None:
        """Go on until that many lives or seconds."""
        started = time.monotonic()
        while self.num_lives < signals and time.monotonic() - started < seconds:
            weighted = [name for name, (_, weight) in self._tracks.items() for _ in range(weight)]
            self._run_life(self._draw("", weighted))

    def _draw(self, deck: str, cards: list[str]) -> str:
        """One of *cards*, none of which comes again before all have come."""
        left = self._decks.setdefault(deck, [])
        if not left:
            left += self._rng.sample(cards, len(cards))
        return left.pop()

    def _decide(self, name: str) -> Life:
        from told import Life

        leaves_now = name != "torchrun" and self._rng.random() < _LEAVE_NOW_SHARE
        return Life(
            moment=self._draw(name, list(MOMENTS)),
            is_twice=leaves_now or self._rng.random() < 0.25,
            leaves_now=leaves_now,
            to_group=self._rng.random() < 0.7,
            save_every=self._rng.choice((1, 4, 12)),
            grace_s=self._grace_s,
            is_fork_shielded=self._is_fork_shielded,
        )

    def _run_life(self, name: str) -> None:
        from procs import reap_all
        from summary import describe_and_kill

        track, life = self._tracks[name][0], self._decide(name)
        track.begin_life()
        trainer = track.start(life)
        self._wait(track, life)
        self._require(track.read()[2])
        moment, sent = track.moment, time.monotonic()
        self._send(trainer, life)
        code = os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1])
        exit_s = time.monotonic() - sent
        codes, left = reap_all(60.0)
        self._require(track.read()[2])
        self.num_lives += 1
        self.slowest_exit_s = max(self.slowest_exit_s, exit_s)
        self._count(name, life, moment, self._end(track, life, code))
        lost, wrong = track.audit(life)
        (self.lost_steps_when_leaving_now if life.leaves_now else self.lost_steps)[lost] += 1
        self._require(wrong)
        self._require([f"left after {exit_s:.1f} s"] if exit_s >= life.grace_s else [])
        self._require([f"a process is left: {describe_and_kill(pid)}" for pid in left])
        # Torchrun, and who leaves at once, leave others to be ended by the signal.
        if name != "torchrun" and not life.leaves_now:
            failed = {pid: code for pid, code in codes.items() if code and not (code == 1 and track.is_worker(pid))}
            self._require([f"processes failed: {failed}"] if failed else [])

    def _end(self, track: Track, life: Life, code: int) -> str:
        for event in ("stopped", "bereaved"):
            if track.has_told(event):
                return event
        if life.leaves_now:
            return "left at once"
        if not track.has_told("trained"):
            return "ended before the handler existed"
        self._require([f"exit code {code} in training, and no word"])
        return "other"

    def _count(self, name: str, life: Life, moment: str, end: str) -> None:
        repeated = ", twice: leave now" if life.leaves_now else ", twice" if life.is_twice else ""
        self.counts["trainings"][name] += 1
        self.counts["moments"][moment + repeated] += 1
        self.counts["ends"][end] += 1

    def _send(self, trainer: int, life: Life) -> None:
        for is_second in range(1 + life.is_twice):
            if is_second:
                time.sleep(self._rng.uniform(0, 0.1))
            # ESRCH: it has not made its group yet.
            try:
                os.killpg(trainer, signal.SIGTERM) if life.to_group else os.kill(trainer, signal.SIGTERM)
            except ProcessLookupError:
                os.kill(trainer, signal.SIGTERM)

    def _wait(self, track: Track, life: Life) -> None:
        """Until the moment has come."""
        deadline = time.monotonic() + _NEWS_TIMEOUT_S
        if life.moment == "start":
            time.sleep(self._rng.uniform(0, track.start_s))
        elif life.moment == "restore":
            while not track.has_told("opened") and time.monotonic() < deadline:
                time.sleep(0.001)
                self._require(track.read()[2])
            time.sleep(self._rng.uniform(0, 0.03))
        else:
            enough = self._rng.randrange(1, 6)
            while enough > 0 and time.monotonic() < deadline:
                time.sleep(0.002)
                num_trained, num_begun, wrong = track.read()
                self._require(wrong)
                enough -= num_begun if life.moment == "save" else num_trained
            time.sleep(self._rng.uniform(0, 0.05))

    def _require(self, wrong: list[str]) -> None:
        self.violations += [f"life {self.num_lives}: {what}" for what in wrong]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "num_signals": self.num_lives,
            **{name: dict(sorted(counter.items())) for name, counter in self.counts.items()},
            "slowest_exit_s": round(self.slowest_exit_s, 2),
            "lost_steps": {str(num): count for num, count in sorted(self.lost_steps.items())},
            "lost_steps_when_leaving_now": {
                str(num): count for num, count in sorted(self.lost_steps_when_leaving_now.items())
            },
            "violations": self.violations,
        }


def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The campaign that the command line asks for; what came of it."""
    from content import Content
    from tracks import FillsTrack, GptTrack, RanksTrack

    started = time.monotonic()
    content = Content()
    gpt = GptTrack(directory / "gpt2")
    tracks: dict[str, tuple[Track, int]] = {"fills": (FillsTrack(directory / "fills", content), 9), "gpt2": (gpt, 9)}
    if arguments.torchrun:
        tracks["torchrun"] = RanksTrack(directory / "torchrun", content), 2
    campaign = Campaign(tracks, arguments.seed, arguments.grace, is_fork_shielded=arguments.fork_shield)
    campaign.run(arguments.signals, arguments.minutes * 60)
    campaign.violations += gpt.compare_with_reference()
    compared = {"num_steps_equal_to_an_uninterrupted_run": len(gpt.expected)}
    seconds = round(time.monotonic() - started)
    return {
        "seeds": [arguments.seed],
        "fork_shield": [arguments.fork_shield],
        **campaign.as_dict(),
        **compared,
        "seconds": seconds,
    }


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=200, help="end after so many")
    parser.add_argument("--minutes", type=float, default=30.0, help="or after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grace", type=float, default=15.0, help="seconds until a trainer must be gone")
    parser.add_argument("--torchrun", action=argparse.BooleanOptionalAction, default=True, help="with or without it")
    parser.add_argument(
        "--fork-shield",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fork DataLoader workers with the signal blocked; without, those hit in their first moments end the loop",
    )
    parser.add_argument("--directory", help="where the checkpoints go; default: the directory for temporary files")
    parser.add_argument("--results", type=Path, help="add a summary, and facts about the machine, to what is here")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    from common import machine_facts
    from procs import adopt_orphans
    from summary import merge

    import asyncckpt as ac

    for name in ac.__all__:  # once, instead of after each fork
        getattr(ac, name)
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="asyncckpt-preemption-", dir=arguments.directory) as directory:
        result = run(arguments, Path(directory))
        if arguments.results:
            earlier = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
            merged = {**merge(earlier, result), "machine": machine_facts(Path(directory))}
            arguments.results.write_text(json.dumps(merged, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
