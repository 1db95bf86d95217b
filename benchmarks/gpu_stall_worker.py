"""One saver of `gpu_stall`, measured in a process of its own; prints one JSON object as its last line."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from gpu_clock import Clock, raw_copy_bytes_per_s
from gpu_peers import GPU_PEERS, read_back
from gpu_state import GPU_SIZES, build_gpu_state, make_tokens, train_step
from peers import Saver

_LEAD_STEPS = 3  # queued right before the save, so that the GPU has work when it is called
_TAIL_STEPS = 5


@dataclass
class Save:
    """One save, as the host and as the device saw it. Seconds.

    Attributes:
        blocked_s: host: how long ``save()`` and the guards after it kept the training loop.
        durable_s: host: from ``save()`` until the acknowledgement.
        lost_s: device: the time from the step before the save to the tail, less its steps at the median alone.
        gap_s: device: without a step between the step before the save and the first one after it.
        other_gaps_s: device: the mean of the other gaps between steps.
        alone_s: device: steps before the save.
        during_s: device: steps between the save and its acknowledgement.
        copy_bytes_per_s: from when the device reached the save until the snapshot was in host memory; None if the
            saver does not tell.
    """

    blocked_s: float
    durable_s: float
    lost_s: float
    gap_s: float
    other_gaps_s: float
    alone_s: list[float] = field(repr=False)
    during_s: list[float] = field(repr=False)
    copy_bytes_per_s: float | None


class Timeline:
    """Runs steps and marks the device's time line before and after each."""

    def __init__(self, saver: Saver, clock: Clock, step: Callable[[Callable[[], Any]], None]) -> None:
        self._saver = saver
        self._clock = clock
        self._step = step
        self.marks: list[tuple[Any, Any]] = []
        self.guard_s = 0.0

    def run(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            begin = self._clock.mark()
            self._step(self._guard)
            self.marks.append((begin, self._clock.mark()))

    def _guard(self) -> Any:
        started = time.perf_counter()
        guard = self._saver.guard()
        guard.__enter__()
        self.guard_s += time.perf_counter() - started
        return _Entered(guard)

    def steps_s(self, start: int, stop: int) -> list[float]:
        return [self._clock.between_s(begin, end) for begin, end in self.marks[start:stop]]

    def gaps_s(self) -> list[float]:
        """Between the end of each step and the begin of the next."""
        return [
            self._clock.between_s(before[1], after[0])
            for before, after in zip(self.marks, self.marks[1:], strict=False)
        ]

    def total_s(self, start: int) -> float:
        return self._clock.between_s(self.marks[start][0], self.marks[-1][1])


class _Entered:
    """A context that was entered before."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> Any:
        return self._context.__exit__(*error)


def measure_save(saver: Saver, clock: Clock, line: Timeline, step: int, alone_steps: int, num_bytes: int) -> Save:
    """Steps alone, a save, steps until it is durable and a few more."""
    line.marks.clear()
    line.run(alone_steps)
    clock.synchronize()
    line.marks.clear()
    line.run(alone_steps + _LEAD_STEPS)
    guard_before, reached = line.guard_s, clock.mark()
    started = time.perf_counter()
    pending = saver.save(step)
    blocked_s = time.perf_counter() - started
    copied = _CopyTimer(saver, clock, reached)
    first = len(line.marks)
    line.run()
    while not pending.done():
        line.run()
    last = len(line.marks)
    line.run(_TAIL_STEPS)
    clock.synchronize()
    pending.check()
    copy_s = copied.seconds()
    alone_s = line.steps_s(0, alone_steps)
    gaps = line.gaps_s()
    before = first - 1
    count = len(line.marks) - before
    lost_s = line.total_s(before) - count * statistics.median(alone_s) - (count - 1) * statistics.median(gaps)
    return Save(
        blocked_s=blocked_s + line.guard_s - guard_before,
        durable_s=pending.durable_at - started,
        lost_s=lost_s,
        gap_s=gaps[before],
        other_gaps_s=statistics.mean(gaps[:before] + gaps[before + 1 :]),
        alone_s=alone_s,
        during_s=line.steps_s(first, last),
        copy_bytes_per_s=None if copy_s is None else num_bytes / copy_s,
    )


class _CopyTimer:
    """Times a snapshot from when the device reached it, beside the training loop."""

    def __init__(self, saver: Saver, clock: Clock, reached: Any) -> None:
        self._seconds: float | None = None
        wait = getattr(saver, "wait_staged", None)

        def watch() -> None:
            assert wait is not None
            clock.wait(reached)
            started = time.perf_counter()
            wait()
            self._seconds = max(time.perf_counter() - started, 1e-9)

        self._thread = threading.Thread(target=watch) if wait is not None else None
        if self._thread is not None:
            self._thread.start()

    def seconds(self) -> float | None:
        if self._thread is not None:
            self._thread.join()
        return self._seconds


class _Values:
    """A state of nothing but a few large tensors, for `find_stale_values`."""

    def __init__(self, device: str) -> None:
        self.tensors = {f"t{index}": torch.zeros(4_000_000, device=device) for index in range(8)}

    def state_dict(self) -> dict[str, Any]:
        return {"model": dict(self.tensors)}

    def objects(self) -> dict[str, Any]:
        return {"model": self.tensors}


def find_stale_values(make: type[Saver], directory: Path, device: str) -> float | None:
    """Whether a save may copy what kernels that are already queued have yet to change.

    A long kernel and an update of every tensor are queued, then the state is saved. The state at ``save()`` is
    the updated one.

    Returns:
        The fraction of the saved values that are older; None if the saver's files are not read here.
    """
    directory.mkdir()
    values, clock = _Values(device), Clock(device)
    saver = make(directory, values)  # type: ignore[arg-type]
    try:
        saver.save(1).check()  # stagers that are kept have their memory now
        clock.synchronize()
        clock.keep_busy()
        for tensor in values.tensors.values():
            tensor.add_(1.0)
        pending = saver.save(2)
        pending.check()
        clock.synchronize()
        found = read_back(saver, 2, values.tensors)
    finally:
        saver.close()
        shutil.rmtree(directory)
    if found is None:
        return None
    return sum(int((tensor != 1.0).sum()) for tensor in found.values()) / sum(t.numel() for t in found.values())


def measure(peer: str, size: str, device: str, directory: Path, repetitions: int, alone_steps: int) -> dict[str, Any]:
    """All numbers of one saver."""
    make = GPU_PEERS[peer]
    stale = find_stale_values(make, directory / "stale", device)
    raw = raw_copy_bytes_per_s(device, 2**30 if size != "tiny" else 2**20)
    state, clock = build_gpu_state(size, device), Clock(device)
    tokens = make_tokens(GPU_SIZES[size], device, batch=4)
    (directory / "saves").mkdir()
    saver = make(directory / "saves", state)
    line = Timeline(saver, clock, lambda guard: train_step(state, tokens, guard))
    saves = []
    try:
        for step in range(1, repetitions + 2):  # the first one also pays for memory and processes
            saves.append(asdict(measure_save(saver, clock, line, step, alone_steps, state.num_bytes)))
            saver.discard(step)
    finally:
        saver.close()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "saver": peer,
        "state_bytes": state.num_bytes,
        "raw_copy_bytes_per_s": raw,
        "stale_fraction": stale,
        "peak_device_bytes": peak,
        "first": saves[0],
        "saves": saves[1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("peer", "size", "device", "directory"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--alone-steps", type=int, required=True)
    a = parser.parse_args()
    directory = Path(a.directory)
    directory.mkdir()
    result = measure(a.peer, a.size, a.device, directory, a.repetitions, a.alone_steps)
    print(json.dumps(common.plain(result), allow_nan=False))


if __name__ == "__main__":
    main()
