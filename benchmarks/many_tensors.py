"""What one tensor costs: 10,000 tensors of 1 KiB, saved, made durable and restored in place.

    python benchmarks/many_tensors.py

Bytes do not matter here (10 MB in all); the numbers are the cost of a leaf, of an array's files and
of opening them again, and they show whether anything grows faster than the number of tensors.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from common import Spread, machine_facts, print_table, scratch_directory, write_results

import asyncckpt as ac

_KIB = 1024


def make_state(num_tensors: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """*num_tensors* float32 tensors of 1 KiB each, normal values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tensors, _KIB // 4, generator=generator)
    # Clones: rows of one tensor would share a storage and be saved as one array.
    return {"tensors": {f"layer_{index:05d}": row.clone() for index, row in enumerate(values)}}


def measure(num_tensors: int, repetitions: int, directory: Path) -> dict[str, Any]:
    """Save a changed state *repetitions* times after a first save, restore each, and compare bit for bit."""
    state = make_state(num_tensors, seed=0)
    target = make_state(num_tensors, seed=1)
    blocked_s, durable_s, restore_s = [], [], []
    with ac.Checkpointer(directory, state, keep=ac.Keep(last=1)) as checkpointer:
        checkpointer.step(0)
        for step in range(1, repetitions + 2):
            for tensor in state["tensors"].values():
                tensor.add_(1.0)
            started = time.perf_counter()
            future = checkpointer.save(step)
            blocked_s.append(time.perf_counter() - started)
            info = future.result()
            durable_s.append(future.stats.durable_s)
            started = time.perf_counter()
            checkpointer.restore(step, state=target)
            restore_s.append(time.perf_counter() - started)
            for name, tensor in state["tensors"].items():
                if not torch.equal(tensor.view(torch.uint8), target["tensors"][name].view(torch.uint8)):
                    raise AssertionError(f"{name} was not restored bit for bit")
        num_files = sum(len(files) for _, _, files in os.walk(info.path))
    return {
        "num_tensors": num_tensors,
        "num_files": num_files,
        "first": {"blocked_s": blocked_s[0], "durable_s": durable_s[0], "restore_s": restore_s[0]},
        "blocked_s": Spread(blocked_s[1:]).as_dict(),
        "durable_s": Spread(durable_s[1:]).as_dict(),
        "restore_s": Spread(restore_s[1:]).as_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=3, help="saves after the first")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/many_tensors.json")
    arguments = parser.parse_args()

    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        result = measure(arguments.tensors, arguments.repetitions, directory)
    num_tensors = result["num_tensors"]
    rows = []
    for label, name in (
        ("save() blocked", "blocked_s"),
        ("until durable", "durable_s"),
        ("restore in place", "restore_s"),
    ):
        seconds = Spread(result[name]["values"])
        per_tensor = f"{1e6 * seconds.median / num_tensors:.1f}"
        rows.append(
            [label, f"{1e3 * result['first'][name]:.0f}", Spread([1e3 * s for s in seconds.values]).text(), per_tensor]
        )
    print_table(("", "first ms", "later ms", "us per tensor"), rows)
    print(f"\n{num_tensors} tensors of 1 KiB, {result['num_files'] / num_tensors:.2f} files per tensor")
    target = write_results("many_tensors", {"machine": facts, **result}, arguments.output)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
