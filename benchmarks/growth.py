"""How the cost of a save grows: with bytes, with tensors, with threads that encode."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import many_tensors
import states
import torch
from common import Spread, print_table, stored_bytes
from memory import return_freed_memory
from questions import REFERENCE, Setup
from workers import Tell, run_in_process, run_watched

TITLE = "How costs grow"
_FEW = 3  # repetitions; one tensor of 8 GB is saved once
_SIZES = (1_000_000_000, 2_000_000_000, 4_000_000_000, 8_000_000_000)
_TINY_SIZES = (1_000_000, 2_000_000)
_COUNTS = (10, 100, 1_000, 10_000)
_RESTORED_BYTES = 4_000_000_000  # a larger one might not fit beside its copy and the arena
_THREADS = (("fast", 1, _FEW), ("fast", 2, _FEW), ("none", 1, 1), ("small", 1, 1))
_SPARE_BYTES = 3_000_000_000


def save_size(tell: Tell, num_bytes: int, repetitions: int, setup: Setup) -> dict[str, Any]:
    """Save one tensor of so many bytes; tells ``ready`` before there is a saver, and ``watch`` before a save."""
    import asyncckpt as ac

    directory = setup.place("size")
    state = states.make_state(f"1x{num_bytes}")
    (tensor,) = state.tensors()
    return_freed_memory()
    tell("ready")
    saves = []
    with ac.Checkpointer(directory, state.objects(), keep=ac.Keep(last=100)) as checkpointer:
        checkpointer.step(0)
        tell("watch")
        for step in range(1, repetitions + 1):
            future = checkpointer.save(step)
            path = future.result().path
            saves.append(dataclasses.asdict(future.stats))
            num_stored = stored_bytes(Path(path))
            if step < repetitions:
                checkpointer.delete(step)
                os.sync()
        tell("unwatch")
        restore_s = None
        if num_bytes <= _RESTORED_BYTES:
            expected = tensor.view(torch.int32).sum()
            tensor.zero_()
            started = time.perf_counter()
            checkpointer.restore(step)
            restore_s = time.perf_counter() - started
            if not torch.equal(tensor.view(torch.int32).sum(), expected):
                raise AssertionError("what came back is not what was saved")
    shutil.rmtree(directory)
    return {"num_bytes": num_bytes, "stored_bytes": num_stored, "restore_s": restore_s, **_medians(saves)}


def save_threads(tell: Tell, preset: Any, threads: int, repetitions: int, setup: Setup) -> dict[str, Any]:
    """Save the trained state with a fixed number of threads."""
    import asyncckpt as ac

    directory = setup.place("threads")
    state = states.make_state(setup.size)
    saves = []
    with ac.Checkpointer(
        directory, state.objects(), compression=preset, writer=ac.Writer(threads=threads), keep=ac.Keep(last=100)
    ) as checkpointer:
        checkpointer.step(0)
        for step in range(1, repetitions + 1):
            future = checkpointer.save(step)
            future.result()
            saves.append(dataclasses.asdict(future.stats))
            checkpointer.delete(step)
            os.sync()
    shutil.rmtree(directory)
    return {"preset": preset, "threads": threads, "num_large": state.num_large, **_medians(saves)}


def _medians(saves: list[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several saves, as spreads."""
    names = ("blocked_s", "encode_s", "write_s", "commit_s", "durable_s")
    spreads = {name: Spread([save[name] for save in saves]).as_dict() for name in names}
    return {"raw_bytes": saves[-1]["raw_bytes"], "stored_bytes": saves[-1]["stored_bytes"], **spreads}


def _fits(num_bytes: int, setup: Setup) -> bool:
    from asyncckpt.memory import available_memory

    memory = available_memory()
    disk = shutil.disk_usage(setup.directory).free
    if memory < 2 * num_bytes + _SPARE_BYTES or disk < num_bytes + _SPARE_BYTES:
        found = f"{memory / 1e9:.0f} GB of memory and {disk / 1e9:.0f} GB of disk are free"
        print(f"a tensor of {num_bytes / 1e9:.0f} GB is left out: {found}", file=sys.stderr)
        return False
    return True


def measure(setup: Setup) -> dict[str, Any]:
    """Sizes, counts and threads."""
    sizes = _TINY_SIZES if setup.is_tiny else _SIZES if setup.large else _SIZES[:-1]
    counts = _COUNTS[:2] if setup.is_tiny else _COUNTS
    few = dataclasses.replace(setup, repetitions=min(_FEW, setup.repetitions))
    return {
        "sizes": [
            run_watched(
                save_size, num_bytes, 1 if num_bytes > _RESTORED_BYTES else few.repetitions, setup, log=setup.log
            )
            for num_bytes in sizes
            if _fits(num_bytes, setup)
        ],
        "counts": [
            run_in_process(many_tensors.measure_saver, REFERENCE, count, few, log=setup.log) for count in counts
        ],
        "threads": [
            run_in_process(save_threads, preset, threads, min(repetitions, few.repetitions), setup, log=setup.log)
            for preset, threads, repetitions in _THREADS
        ],
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        [
            f"{size['num_bytes'] / 1e9:g} GB",
            Spread([1e3 * seconds for seconds in size["blocked_s"]["values"]]).text(),
            Spread(size["durable_s"]["values"]).text(2),
            f"{size['num_bytes'] / size['durable_s']['median'] / 1e9:.2f}",
            f"{size['restore_s']:.2f}" if size["restore_s"] else "",
            f"{(size['peak_bytes'] - size['idle_bytes'] - size['num_bytes']) / 1e6:.0f}",
        ]
        for size in result["sizes"]
    ]
    print_table(("one tensor of", "blocked ms", "durable s", "GB/s", "restore s", "memory beside one copy, MB"), rows)
    print()
    rows = [
        [
            str(count["num_tensors"]),
            *(Spread([1e3 * seconds for seconds in count[name]["values"]]).text(1)
              for name in ("blocked_s", "durable_s", "restore_s")),
        ]
        for count in result["counts"]
    ]  # fmt: skip
    print_table(("tensors of 1 KiB", "blocked ms", "durable ms", "restore ms"), rows)
    print()
    rows = [
        [f"{run['preset']}, {run['threads']} threads", Spread(run["durable_s"]["values"]).text(2),
         *(f"{run[name]['median']:.2f}" for name in ("encode_s", "write_s", "commit_s"))]
        for run in result["threads"]
    ]  # fmt: skip
    print_table(("encode threads", "durable s", "encode thread-s", "write thread-s", "commit s"), rows)
