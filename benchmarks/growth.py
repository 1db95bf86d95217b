"""How the cost of a save grows: with bytes, with tensors, with threads that encode."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from typing import Any

import many_tensors
import states
import torch
from common import Spread, available_cpus, print_table
from memory import return_freed_memory
from questions import REFERENCE, Setup
from workers import Tell, run_in_process, run_watched

TITLE = "How costs grow"
_FEW = 3  # repetitions
_FEWER = 2  # of what has many bytes; of more than 4 GB one
_SIZES = (1_000_000_000, 4_000_000_000, 8_000_000_000)
_TINY_SIZES = (1_000_000, 2_000_000)
_COUNTS = (10, 100, 1_000, 10_000)
_RESTORED_BYTES = 4_000_000_000  # a larger one might not fit beside its copy and the arena
_SPARE_BYTES = 3_000_000_000


def save_size(tell: Tell, num_bytes: int, repetitions: int, setup: Setup) -> dict[str, Any]:
    """Save one tensor of so many bytes; tells ``ready`` before there is a saver, and ``watch`` before a save.

    Only the first save is watched: looking at the memory of gigabytes 20 times a second keeps nearly half a core
    busy, and the writer encodes on the cores that nobody else uses.
    """
    import asyncckpt as ac

    directory = setup.place("size")
    state = states.make_state(f"1x{num_bytes}")
    (tensor,) = state.tensors()
    return_freed_memory()
    tell("ready")
    with ac.Checkpointer(directory, state.objects(), keep=ac.Keep(last=100)) as checkpointer:
        checkpointer.step(0)
        tell("watch")
        saves = [_save_and_delete(checkpointer, 1)]
        tell("unwatch")
        saves += [_save_and_delete(checkpointer, step) for step in range(2, repetitions + 1)]
        step = repetitions + 1
        saves.append(_save(checkpointer, step))
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
    return {"num_bytes": num_bytes, "restore_s": restore_s, **_medians(saves)}


def save_threads(tell: Tell, preset: Any, threads: int, repetitions: int, setup: Setup) -> dict[str, Any]:
    """Save the trained state with a fixed number of threads."""
    import asyncckpt as ac

    directory = setup.place("threads")
    state = states.make_state(setup.size)
    with ac.Checkpointer(
        directory, state.objects(), compression=preset, writer=ac.Writer(threads=threads), keep=ac.Keep(last=100)
    ) as checkpointer:
        checkpointer.step(0)
        saves = [_save_and_delete(checkpointer, step) for step in range(repetitions + 1)]
    shutil.rmtree(directory)
    return {"preset": preset, "threads": threads, "num_large": state.num_large, **_medians(saves)}


def _save(checkpointer: Any, step: int) -> dict[str, Any]:
    """What a save took."""
    future = checkpointer.save(step)
    future.result()
    return dataclasses.asdict(future.stats)


def _save_and_delete(checkpointer: Any, step: int) -> dict[str, Any]:
    """The same; afterwards the disk is as if it had never been."""
    stats = _save(checkpointer, step)
    checkpointer.delete(step)
    os.sync()
    return stats


def _medians(saves: list[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several saves, as spreads without those of the first, which also commits its memory."""
    names = ("blocked_s", "encode_s", "write_s", "commit_s", "durable_s")
    first, *others = saves
    return {
        "raw_bytes": others[-1]["raw_bytes"],
        "stored_bytes": others[-1]["stored_bytes"],
        "first": {name: first[name] for name in names},
        **{name: Spread([save[name] for save in others]).as_dict() for name in names},
    }


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
    fewer = min(_FEWER, setup.repetitions)
    cores = available_cpus()
    threads = (("fast", 1), *((preset, cores) for preset in ("fast", "none", "small")))
    return {
        "sizes": [
            run_watched(save_size, num_bytes, 1 if num_bytes > _RESTORED_BYTES else fewer, setup, log=setup.log)
            for num_bytes in sizes
            if _fits(num_bytes, setup)
        ],
        "counts": [
            run_in_process(many_tensors.measure_saver, REFERENCE, count, few, log=setup.log) for count in counts
        ],
        "threads": [
            run_in_process(save_threads, preset, number, fewer, setup, log=setup.log)
            for preset, number in dict.fromkeys(threads)
        ],
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        [
            f"{size['num_bytes'] / 1e9:g} GB",
            Spread([1e3 * seconds for seconds in size["blocked_s"]["values"]]).text(),
            Spread(size["durable_s"]["values"]).text(2),
            f"{size['first']['durable_s']:.2f}",
            f"{size['num_bytes'] / size['durable_s']['median'] / 1e9:.2f}",
            f"{size['restore_s']:.2f}" if size["restore_s"] else "",
            f"{(size['peak_bytes'] - size['idle_bytes'] - size['num_bytes']) / 1e6:.0f}",
        ]
        for size in result["sizes"]
    ]
    print_table(
        ("one tensor of", "blocked ms", "durable s", "first s", "GB/s", "restore s", "memory beside one copy, MB"), rows
    )
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
