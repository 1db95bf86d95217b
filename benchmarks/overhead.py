"""What the package costs by itself: the import, the writer's start and memory, and memory over many saves."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import states
from common import REPOSITORY, Spread, print_table
from memory import resident_bytes, return_freed_memory, tree_bytes
from questions import Setup
from workers import Tell, run_in_process

TITLE = "What importing it and its writer cost"
_IMPORTS = """
import time
import torch
times = [time.perf_counter()]
import asyncckpt
times.append(time.perf_counter())
asyncckpt.Checkpointer
times.append(time.perf_counter())
print(*(1e3 * (after - before) for before, after in zip(times, times[1:])))
"""
_MANY_SAVES = 200
_SETTLED = 40  # saves after which allocators have what they need


def import_times(setup: Setup) -> dict[str, Any]:
    """Milliseconds of ``import asyncckpt`` and of the first use of `Checkpointer`, torch being there already."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pairs = []
    for _ in range(setup.repetitions + 1):
        printed = subprocess.run([sys.executable, "-c", _IMPORTS], env=environment, capture_output=True, check=True)
        pairs.append([float(text) for text in printed.stdout.split()])
    imports, first_uses = zip(*pairs[1:], strict=True)  # the first one also reads files
    return {"import_ms": Spread(imports).as_dict(), "first_use_ms": Spread(first_uses).as_dict()}


def start_writers(tell: Tell, setup: Setup) -> dict[str, Any]:
    """Seconds from making a checkpointer until its writer has committed something, less what a commit takes."""
    import asyncckpt as ac

    state = states.make_state("1x1024")
    warm_s = []
    for repetition in range(setup.repetitions + 1):
        started = time.perf_counter()
        with ac.Checkpointer(setup.place("start"), state.objects(), keep=ac.Keep(last=100)) as checkpointer:
            seconds = []
            for step in range(4):
                checkpointer.save(100 * repetition + step).result()
                seconds.append(time.perf_counter() - started)
        later = [after - before for before, after in itertools.pairwise(seconds)]
        warm_s.append(seconds[0] - statistics.median(later))
    shutil.rmtree(setup.place("start"))
    return Spread(warm_s[1:]).as_dict()


def watch_writer(tell: Tell, setup: Setup) -> dict[str, float]:
    """Resident bytes of the writer without the arena: before the first save, the most in one, and after it."""
    import asyncckpt as ac

    state = states.make_state(setup.size)
    events: list[ac.Event] = []
    with ac.Checkpointer(setup.place("resident"), state.objects(), on_event=events.append) as checkpointer:
        pid = next(event.fields["writer_pid"] for event in events if event.name == "checkpointer.opened")
        tiny = states.make_state("1x1024")
        checkpointer.save(0, tiny.objects()).result()
        idle = resident_bytes(pid)
        saving = checkpointer.save(1)
        peak = idle
        while not saving.done():
            peak = max(peak, resident_bytes(pid))
        saving.result()
        after = resident_bytes(pid)
    shutil.rmtree(setup.place("resident"))
    return {"idle_bytes": idle, "peak_bytes": peak, "after_bytes": after}


def save_many(tell: Tell, setup: Setup) -> dict[str, Any]:
    """Memory of trainer and writer together after each of many saves of a changing state."""
    import asyncckpt as ac

    state = states.make_state("32x262144")
    pss = []
    with ac.Checkpointer(setup.place("many"), state.objects(), keep=ac.Keep(last=2)) as checkpointer:
        for step in range(20 if setup.is_tiny else _MANY_SAVES):
            for tensor in state.tensors():
                tensor.add_(1e-3)
            checkpointer.save(step).result()
            return_freed_memory()
            pss.append(tree_bytes(os.getpid()))
    shutil.rmtree(setup.place("many"))
    settled = pss[_SETTLED if len(pss) > 2 * _SETTLED else len(pss) // 4 :]
    third = max(1, len(settled) // 3)
    growth = statistics.median(settled[-third:]) - statistics.median(settled[:third])
    return {"num_saves": len(pss), "pss_bytes": pss, "growth_bytes": growth}


def measure(setup: Setup) -> dict[str, Any]:
    """Everything, one after another."""
    return {
        **import_times(setup),
        "warm_s": run_in_process(start_writers, setup, log=setup.log),
        "writer": run_in_process(watch_writer, setup, log=setup.log),
        "many": run_in_process(save_many, setup, log=setup.log),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    writer, many = result["writer"], result["many"]
    rows = [
        ["import asyncckpt, torch being imported: ms", Spread(result["import_ms"]["values"]).text(1)],
        ["first use of Checkpointer after it: ms", Spread(result["first_use_ms"]["values"]).text(1)],
        ["writer warm after: s", Spread(result["warm_s"]["values"]).text(2)],
        *([f"writer resident without the arena, {when}: MB", f"{writer[f'{when}_bytes'] / 1e6:.0f}"]
          for when in ("idle", "peak", "after")),
        [f"growth over {many['num_saves']} saves: MB", f"{many['growth_bytes'] / 1e6:.2f}"],
    ]  # fmt: skip
    print_table(("", "median (range)"), rows)
