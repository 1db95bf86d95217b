"""What one tensor costs: 10,000 tensors of 1 KiB, saved, made durable and restored in place.

    python benchmarks/many_tensors.py

Bytes do not matter here (10 MB in all); the numbers are the cost of a leaf, of an array's files and
of opening them again, and they show whether anything grows faster than the number of tensors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from typing import Any

import torch
from common import Spread, machine_facts, print_table, scratch_directory, write_results
from peers import PEERS
from questions import Setup
from states import make_state
from workers import Tell, run_in_process

TITLE = "Many small tensors"
# Not torch_checkpointing: it passes one descriptor per tensor to its process, more than may be open by default.
SAVERS = (
    "torch.save", "dcp.save",  "safetensors", "tensorstore", "asyncckpt fast", "asyncckpt none",
)  # fmt: skip
_KIB = 1024
_FEWER_REPETITIONS = {"tensorstore": 2}  # ten seconds each, and as many to delete it


def measure_saver(tell: Tell, peer: str, num_tensors: int, setup: Setup) -> dict[str, Any]:
    """Save a changed state so many times after a first save, restore each, and compare bit for bit."""
    directory = setup.place(peer)
    directory.mkdir()
    state = make_state(f"{num_tensors}x{_KIB}")
    saver = PEERS[peer](directory, state)
    blocked_s, durable_s, restore_s = [], [], []
    repetitions = min(setup.repetitions, _FEWER_REPETITIONS.get(peer, setup.repetitions))
    for step in range(repetitions + 1):
        for tensor in state.tensors():
            tensor.add_(1.0)
        expected = torch.stack(state.tensors())
        started = time.perf_counter()
        pending = saver.save(step)
        blocked_s.append(time.perf_counter() - started)
        pending.wait()
        durable_s.append(pending.durable_at - started)
        for tensor in state.tensors():
            tensor.zero_()
        started = time.perf_counter()
        saver.restore(step)
        restore_s.append(time.perf_counter() - started)
        if not torch.equal(torch.stack(state.tensors()), expected):
            raise AssertionError(f"{peer} did not restore what it saved")
        path = saver.path(step)
        num_files = 1 if path.is_file() else sum(len(files) for _, _, files in os.walk(path))
        saver.discard(step)
    saver.close()
    shutil.rmtree(directory)
    return {
        "saver": peer,
        "num_tensors": num_tensors,
        "num_files": num_files,
        "first": {"blocked_s": blocked_s[0], "durable_s": durable_s[0], "restore_s": restore_s[0]},
        "blocked_s": Spread(blocked_s[1:]).as_dict(),
        "durable_s": Spread(durable_s[1:]).as_dict(),
        "restore_s": Spread(restore_s[1:]).as_dict(),
    }


def measure(setup: Setup, num_tensors: int | None = None) -> dict[str, Any]:
    """All savers, one after another."""
    num_tensors = num_tensors or (100 if setup.is_tiny else 10_000)
    savers = [run_in_process(measure_saver, peer, num_tensors, setup, log=setup.log) for peer in setup.choose(SAVERS)]
    return {"num_tensors": num_tensors, "savers": savers}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    num_tensors = result["num_tensors"]
    rows = []
    for saver in result["savers"]:
        cells = [saver["saver"], f"{1e3 * saver['first']['blocked_s']:.0f}"]
        for name in ("blocked_s", "durable_s", "restore_s"):
            spread = Spread([1e3 * seconds for seconds in saver[name]["values"]])
            cells += [spread.text(), f"{1e3 * spread.median / num_tensors:.1f}"]
        rows.append([*cells, f"{saver['num_files'] / num_tensors:.2f}"])
    print_table(
        ("saver", "first ms", "blocked ms", "us each", "durable ms", "us each", "restore ms", "us each", "files each"),
        rows,
    )
    print(f"\n{num_tensors} tensors of 1 KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=5, help="saves after the first")
    parser.add_argument("--peers", nargs="+", choices=SAVERS, default=SAVERS)
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/many_tensors.json")
    arguments = parser.parse_args()

    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        setup = Setup(directory, repetitions=arguments.repetitions, peers=arguments.peers)
        result = measure(setup, arguments.tensors)
    show(result)
    target = write_results("many_tensors", {"machine": facts, **result}, arguments.output)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
