"""The adaptive policy on a simulated cluster: seeded failures, saves that block and slow steps, restarts.

Everything but the cluster is real: `SaveDecider` asks the policy, on a clock that the simulation moves, and
measures costs from nothing but the moments of its calls and the statistics of durable saves.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

import pytest

from asyncckpt.checkpointer.deciding import SaveDecider
from asyncckpt.future import SavePromise
from asyncckpt.model import SaveStats
from asyncckpt.policies import Adaptive, Every, When
from asyncckpt.policies.adaptive import young_daly_interval
from tests.unit.test_retention import info


@dataclass(frozen=True)
class Cluster:
    """What training and saving take; seconds of wall time.

    Attributes:
        step_s: a training step, on average.
        blocked_s: how long a save blocks training.
        durable_s: from the begin of a save until it is durable.
        slower: by which factor steps take longer meanwhile.
        restart_s: from a failure until training goes on.
        jitter: standard deviation of the time of a step, relative.
    """

    step_s: float
    blocked_s: float
    durable_s: float
    slower: float
    restart_s: float = 120.0
    jitter: float = 0.05

    @property
    def cost_s(self) -> float:
        """Training time that a save costs."""
        return self.blocked_s + (self.durable_s - self.blocked_s) * (1 - 1 / self.slower)


class Run:
    """A job on *cluster* from its first start to *until_s*, over all failures and restarts."""

    def __init__(self, cluster: Cluster, when: When, seed: int) -> None:
        self.cluster = cluster
        self.when = when
        self.now_s = 0.0
        self.durable_step = 0
        self.num_saves = 0
        self._failures = random.Random(seed)
        self._noise = random.Random(seed + 1)

    def goodput(self, until_s: float, mtbf_s: float | None) -> float:
        """The part of the time in which steps were made that were not lost again."""
        while self.now_s < until_s:
            life_s = until_s if mtbf_s is None else self._failures.expovariate(1 / mtbf_s)
            last_step = self._live(min(self.now_s + life_s, until_s))
            if self.now_s < until_s:
                self.now_s += self.cluster.restart_s
        return last_step * self.cluster.step_s / self.now_s

    def _live(self, until_s: float) -> int:
        """Train from the last durable step until the job fails; how far it came."""
        decider = SaveDecider(self.when, clock=lambda: self.now_s)
        decider.note_restored(self.durable_step)
        step, saving, durable_at = self.durable_step, None, math.inf
        while True:
            slower = self.cluster.slower if saving is not None else 1.0
            self.now_s += self.cluster.step_s * slower * self._noise.gauss(1.0, self.cluster.jitter)
            if saving is not None and durable_at <= min(self.now_s, until_s):
                self._complete(saving)
                saving = None
            if self.now_s >= until_s:
                self.now_s = until_s
                return step
            step += 1
            if decider.after_step(step) is not None:
                assert saving is None, "no save begins beside another"
                saving = SavePromise(step)
                durable_at = self.now_s + self.cluster.durable_s
                decider.note_begun(saving.future, {})
                self.num_saves += 1
                self.now_s += self.cluster.blocked_s

    def _complete(self, saving: SavePromise) -> None:
        stats = SaveStats(blocked_s=self.cluster.blocked_s, durable_s=self.cluster.durable_s)
        saving.set_result(info(saving.future.step), stats)
        self.durable_step = saving.future.step


CLUSTERS = {
    "large and slow": (Cluster(step_s=20.0, blocked_s=20.0, durable_s=120.0, slower=1.5), 3_600.0),
    "blocking only": (Cluster(step_s=10.0, blocked_s=30.0, durable_s=60.0, slower=1.0), 3_600.0),
    "slowing only": (Cluster(step_s=10.0, blocked_s=0.0, durable_s=200.0, slower=1.2), 7_200.0),
    "steps longer than saves": (Cluster(step_s=60.0, blocked_s=10.0, durable_s=30.0, slower=1.3), 14_400.0),
    "cheap": (Cluster(step_s=15.0, blocked_s=0.5, durable_s=20.0, slower=1.05), 7_200.0),
    "rare failures": (Cluster(step_s=60.0, blocked_s=15.0, durable_s=90.0, slower=1.2), 43_200.0),
    "noisy": (Cluster(step_s=20.0, blocked_s=10.0, durable_s=100.0, slower=1.5, jitter=0.3), 3_600.0),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_goodput_is_that_of_the_optimum_it_does_not_know(name: str, full: bool) -> None:
    cluster, mtbf_s = CLUSTERS[name]
    optimum_s = young_daly_interval(cluster.cost_s, mtbf_s)
    until_s = 150 * mtbf_s
    ratios = []
    for seed in range(20 if full else 1):  # both get the same failures, whose luck then matters little
        best = Run(cluster, Every(seconds=optimum_s), seed).goodput(until_s, mtbf_s)
        run = Run(cluster, Adaptive(max_overhead=0.25, mtbf=mtbf_s), seed)
        ratios.append(run.goodput(until_s, mtbf_s) / best)
        assert run.num_saves > 150
    print(f"{name}: {statistics.mean(ratios) - 1:+.2%} ({min(ratios) - 1:+.2%} to {max(ratios) - 1:+.2%})")
    assert statistics.mean(ratios) >= 0.98


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("max_overhead", [0.01, 0.05])
def test_the_cap_is_kept_and_used(name: str, max_overhead: float) -> None:
    cluster, _ = CLUSTERS[name]
    until_s = 400 * cluster.cost_s / max_overhead
    quiet = Run(cluster, Every(seconds=2 * until_s), 0).goodput(until_s, None)
    run = Run(cluster, Adaptive(max_overhead=max_overhead), 0)
    overhead = 1 - run.goodput(until_s, None) / quiet
    print(f"{name}: {overhead:.4f} of at most {max_overhead}, {run.num_saves} saves")
    # The next save begins after five steps beside none, which come after as many seconds as this one took.
    shortest_s = 2 * cluster.durable_s + 7 * cluster.step_s
    assert overhead <= max_overhead
    assert overhead >= 0.6 * max_overhead or 0.8 * max_overhead * shortest_s > cluster.cost_s
