"""How many threads encode at a time: as many as there are cores that nobody else uses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

from asyncckpt.processes import available_cpus

__all__ = ["CoreBudget", "choose_workers", "plan_cores", "read_busy_s"]

_INTERVAL_S = 0.2
_MOST_CORES = 8  # more than any disk takes of what they compress
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def plan_cores(num_cpus: int, busy: float, most: int) -> int:
    """How many cores the writer may take.

    Args:
        num_cpus: cores it may run on.
        busy: how many of them others kept busy of late.
        most: upper bound.
    """
    # Rounded in the writer's favour by less than a third of a core: a launch-bound trainer keeps its own.
    return max(1, min(most, int(num_cpus - busy + 0.3)))


def read_busy_s() -> float | None:
    """CPU seconds that other processes have used so far on the cores of this one; None where nobody tells."""
    try:
        with open("/proc/stat", "rb") as file:
            lines = file.read().split(b"\n")
        mine = {b"cpu%d" % cpu for cpu in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for line in lines:
        name, *counts = line.split()[:9] or [b""]
        if name in mine:  # user, nice, system, idle, iowait, irq, softirq, steal: see proc_stat(5)
            ticks += sum(map(int, counts)) - int(counts[3]) - int(counts[4])
    return ticks / _TICKS_PER_S - time.process_time()


class CoreBudget:
    """A semaphore whose size follows what the machine has to spare; use it as a context manager.

    While training is launch-bound it keeps its core; once it waits for the GPU, or for the save itself,
    the writer takes what lies idle and is done sooner.

    Args:
        num_cpus: cores this process may run on.
        most: how many threads may be inside at a time.
        first: how many may before anything was measured.
        read_busy_s: see the function of that name; the size never changes if that cannot tell.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        num_cpus: int,
        most: int,
        first: int,
        read_busy_s: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_cpus = num_cpus
        self._most = most
        self._read_busy_s = read_busy_s
        self._clock = clock
        self._changed = threading.Condition()
        # Guarded by the condition.
        self._limit = first
        self._num_inside = 0
        self._last_s = clock()
        self._last_busy_s = read_busy_s()

    @property
    def limit(self) -> int:
        """How many threads may be inside now."""
        return self._limit

    def take_all(self) -> None:
        """Let as many in as ever may be, from now on, whoever else needs the cores."""
        with self._changed:
            self._limit = self._most
            self._read_busy_s = lambda: None
            self._changed.notify_all()

    def __enter__(self) -> None:
        with self._changed:
            self._adjust()
            self._changed.wait_for(lambda: self._num_inside < self._limit)
            self._num_inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._num_inside -= 1
            self._adjust()
            self._changed.notify()

    def _adjust(self) -> None:
        now_s = self._clock()
        elapsed_s = now_s - self._last_s
        if elapsed_s < _INTERVAL_S:
            return
        busy_s, before_s = self._read_busy_s(), self._last_busy_s
        self._last_s, self._last_busy_s = now_s, busy_s
        if busy_s is None or before_s is None:
            return
        self._limit = plan_cores(self._num_cpus, (busy_s - before_s) / elapsed_s, self._most)
        self._changed.notify_all()

    def __repr__(self) -> str:
        return f"<CoreBudget {self._num_inside} of {self._limit}, at most {self._most}>"


def choose_workers(threads: int | None, *, is_own_process: bool) -> tuple[int, CoreBudget]:
    """How many threads write files, and the budget that says how many of them may encode at a time.

    Args:
        threads: `Writer.threads`: so many do both, no more and no less. None: twice as many as may encode, so
            that neither the disk nor a core waits for the other.
        is_own_process: whether the writer is a process of its own, whose CPU time can be told from the trainer's.
    """
    if threads is not None:
        return threads, CoreBudget(threads, threads, threads, lambda: None)
    num_cpus = available_cpus()
    most = min(_MOST_CORES, num_cpus)
    budget = CoreBudget(num_cpus, most, max(1, most // 2), read_busy_s if is_own_process else lambda: None)
    return 2 * most, budget
