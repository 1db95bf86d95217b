"""What `Adaptive` makes of a cap: a launch-bound loop that saves as often as it is allowed to.

    python benchmarks/adaptive.py

The policy measures costs by itself, from the times of its ``step()`` calls. Here they are measured once more, in the
way of ``lost_time.py``, and the sum over the whole run is compared with the cap.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Spread, machine_facts, print_table, scratch_directory, write_results
from loop import LaunchBoundLoop

import asyncckpt as ac

_TAIL_STEPS = 20
_MIB = 2**20


@dataclass
class Saved:
    """One save.

    Attributes:
        began_s: from the start of the run.
        interval_s: what the policy had decided on.
        estimate_s: what the policy took a save to cost, before this one.
        lost_s: wall time from `step()` until `_TAIL_STEPS` steps after the save was durable, or until the next save
            began, less the number of steps times the median step before the save.
        blocked_s: how long `step()` kept the loop.
        durable_s: from `step()` until the acknowledgement.
    """

    began_s: float
    interval_s: float
    estimate_s: float
    lost_s: float = 0.0
    blocked_s: float = 0.0
    durable_s: float = 0.0


class Training:
    """The loop, its state, and what its saves cost.

    Every step changes one value in each tensor, so that a save finds no file to link and writes every byte.
    """

    def __init__(self, num_bytes: int) -> None:
        self.loop = LaunchBoundLoop()
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            f"layer_{index:03d}": torch.randn(_MIB, generator=generator) for index in range(num_bytes // (4 * _MIB))
        }
        self._touched = [tensor[:1] for tensor in self.tensors.values()]
        self.step_number = 0
        self.saves: list[Saved] = []

    def step(self) -> float:
        """One training step; its seconds."""
        started = time.perf_counter()
        self.loop.step(nullcontext)
        torch._foreach_add_(self._touched, 1.0)
        self.step_number += 1
        return time.perf_counter() - started

    def run(self, checkpointer: ac.Checkpointer, seconds: float) -> float:
        """Train for so many seconds and until the last save is accounted for; the wall time of all of it."""
        started = time.perf_counter()
        alone_s: list[float] = []
        while time.perf_counter() - started < seconds:
            alone_s.append(self.step())
            begun = self._step(checkpointer, started)
            while begun is not None and time.perf_counter() - started < seconds:
                begun = self._follow(checkpointer, *begun, started, statistics.median(alone_s))
                alone_s = alone_s[-_TAIL_STEPS:]  # if the next save comes before there are others
        return time.perf_counter() - started

    def _step(self, checkpointer: ac.Checkpointer, started: float) -> tuple[ac.SaveFuture, Saved] | None:
        report = checkpointer.statistics().policy
        assert report is not None
        called = time.perf_counter()
        saving = checkpointer.step(self.step_number)
        return None if saving is None else (saving, Saved(called - started, report.interval_s, report.cost_s))

    def _follow(
        self, checkpointer: ac.Checkpointer, saving: ac.SaveFuture, saved: Saved, started: float, step_s: float
    ) -> tuple[ac.SaveFuture, Saved] | None:
        """Train until well after *saving* is durable, or until the next save begins: that one."""
        self.saves.append(saved)
        before = self.step_number
        begun = None
        remaining = _TAIL_STEPS
        while remaining > 0 and begun is None:
            self.step()
            ended = time.perf_counter() - started
            begun = self._step(checkpointer, started)
            if begun is not None and not saving.done():
                raise AssertionError("a save began beside another")
            remaining -= saving.done()
        saved.lost_s = ended - saved.began_s - (self.step_number - before) * step_s
        saving.result()
        saved.blocked_s, saved.durable_s = saving.stats.blocked_s, saving.stats.durable_s
        return begun


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One run of the policy."""
    torch.set_num_threads(1)
    training = Training(arguments.megabytes * _MIB)
    for _ in range(20):
        training.step()
    when = ac.Adaptive(max_overhead=arguments.max_overhead, shortest_s=arguments.shortest)
    with ac.Checkpointer(directory, {"tensors": training.tensors}, when=when, keep=ac.Keep(last=2)) as checkpointer:
        wall_s = training.run(checkpointer, arguments.seconds)
        report = checkpointer.statistics().policy
        assert report is not None
    return {
        "state_bytes": sum(tensor.nbytes for tensor in training.tensors.values()),
        "max_overhead": arguments.max_overhead,
        "shortest_s": arguments.shortest,
        "wall_s": wall_s,
        "num_steps": training.step_number,
        "overhead": sum(saved.lost_s for saved in training.saves) / wall_s,
        "report": asdict(report),
        "saves": [asdict(saved) for saved in training.saves],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state, in MiB")
    parser.add_argument("--max-overhead", type=float, default=0.02)
    parser.add_argument("--shortest", type=float, default=1.0, help="shortest interval, in seconds")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to train")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/adaptive.json")
    arguments = parser.parse_args()

    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        result = measure(arguments, directory)
    rows = [
        [name, Spread([1e3 * saved[key] for saved in result["saves"]]).text()]
        for name, key in (
            ("lost ms/save", "lost_s"),
            ("estimated ms", "estimate_s"),
            ("blocked ms", "blocked_s"),
            ("durable ms", "durable_s"),
            ("interval ms", "interval_s"),
        )
    ]
    print_table((f"{len(result['saves'])} saves", "median (range)"), rows)
    verdict = "under" if result["overhead"] <= result["max_overhead"] else "OVER"
    cap, wall_s = result["max_overhead"], result["wall_s"]
    print(f"\noverhead {result['overhead']:.2%} of {wall_s:.0f} s, {verdict} the cap of {cap:.2%}")
    print(f"the policy at the end: every {result['report']['interval_s']:.2f} s, {result['report']['reason']}")
    target = write_results("adaptive", {"machine": facts, **result}, arguments.output)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
