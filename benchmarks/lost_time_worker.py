"""One peer of `lost_time`, measured in a process of its own.

It tells its parent when it is ``ready``, and ``watch`` and ``unwatch`` around the save whose memory is sampled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import common
import torch
from loop import LaunchBoundLoop
from memory import return_freed_memory
from peers import PEERS, Saver
from probes import memcpy_seconds
from questions import Setup
from states import make_state
from workers import Tell

_TAIL_STEPS = 20


@dataclass
class Measured:
    """One save.

    Attributes:
        blocked_s: how long ``save()`` and, after it, the guards kept the training loop.
        durable_s: from ``save()`` until the acknowledgement.
        lost_s: wall time of the window minus its number of steps times the median step alone. The
            window opens before ``save()`` and closes `_TAIL_STEPS` steps after the acknowledgement,
            so what a saver does after it counts too.
        alone_s: seconds of each step right before the save.
        writing_s: seconds of each step between the return of ``save()`` and the acknowledgement.
        stored_bytes: what lies on disk afterwards.
    """

    blocked_s: float
    durable_s: float
    lost_s: float
    alone_s: list[float] = field(repr=False)
    writing_s: list[float] = field(repr=False)
    stored_bytes: int


def measure_save(saver: Saver, loop: LaunchBoundLoop, step: int, alone_steps: int) -> Measured:
    """Take *alone_steps* steps, then save and go on training until well after it is durable."""
    alone_s = loop.run(alone_steps, saver.guard)
    guard_before = loop.guard_s
    with _all_cores():
        started = time.perf_counter()
        pending = saver.save(step)
        returned = time.perf_counter()
    during_s: list[float] = []
    if not pending.done():
        during_s = loop.run(1, saver.guard, until=pending.done)
    tail_s = loop.run(_TAIL_STEPS, saver.guard)
    ended = time.perf_counter()
    pending.check()
    num_steps = len(during_s) + len(tail_s)
    return Measured(
        blocked_s=returned - started + loop.guard_s - guard_before,
        durable_s=pending.durable_at - started,
        lost_s=ended - started - num_steps * statistics.median(alone_s),
        alone_s=alone_s,
        writing_s=during_s,
        stored_bytes=common.stored_bytes(saver.path(step)),
    )


def measure_peer(tell: Tell, peer: str, setup: Setup) -> dict[str, Any]:
    """Everything this process measures."""
    directory = setup.place(peer)
    directory.mkdir()
    state = make_state(setup.size)
    return_freed_memory()
    torch.set_num_threads(1)
    tell("ready")
    saver = PEERS[peer](directory, state)
    loop = LaunchBoundLoop()
    loop.run(10, saver.guard)

    measured, memcpy_s = [], []
    for step in range(1, setup.repetitions + 2):  # the first one is the warm-up
        # Right before each save, so that both see the same machine.
        with _all_cores():
            memcpy_s += memcpy_seconds(state.tensors(), repetitions=3)
        measured.append(measure_save(saver, loop, step, setup.alone_steps))
        saver.discard(step)
        os.sync()  # deleting a gigabyte is not part of the next save
    tell("watch")
    step += 1
    measure_save(saver, loop, step, 5)
    tell("unwatch")
    saver.discard(step)
    saver.close()
    shutil.rmtree(directory, ignore_errors=True)
    return {
        "peer": peer,
        "state_bytes": state.num_bytes,
        "num_large_tensors": state.num_large,
        "memcpy_s": memcpy_s,
        "direct_io": getattr(saver, "use_direct_io", None),
        "first": asdict(measured[0]),
        "saves": [asdict(save) for save in measured[1:]],
    }


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let torch use every core, for copies; the loop only ever uses one."""
    torch.set_num_threads(common.available_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(1)
