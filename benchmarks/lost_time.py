"""How much training time a save costs: asyncckpt and its peers beside a launch-bound loop.

    python benchmarks/lost_time.py                  # GPT-2 124M + AdamW, 1.49 GB; about ten minutes
    python benchmarks/lost_time.py --size tiny      # seconds, and only shows that it runs

Every peer runs in a process of its own, one after another, in one run. Put ``--directory`` on the
disk that matters; nothing is left on it. README.md says what each number means.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import Any

import lost_time_worker
import numpy as np
from common import (
    Spread,
    available_cpus,
    machine_facts,
    print_table,
    scratch_directory,
    warn_if_busy,
    write_results,
)  # fmt: skip
from probes import direct_write_seconds
from questions import REFERENCE, Setup
from workers import run_watched

TITLE = "Training time lost per save, in a launch-bound loop"
SAVERS = (
    "torch.save", "dcp.async_save thread", "dcp.async_save process", "torch_checkpointing",
    "asyncckpt fast", "asyncckpt none", "asyncckpt small",
)  # fmt: skip
_HEADER = (
    "saver", "blocked ms", "memcpy ms", "x memcpy", "lost ms/save", "x ours", "p50 ms alone", "writing",
    "p99 ms alone", "writing", "slower %", "durable s", "stored MB", "peak MB", "first blocked ms",
)  # fmt: skip


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the table, from the raw repetitions of one peer."""
    saves = result["saves"]
    alone_ms = 1e3 * np.concatenate([save["alone_s"] for save in saves])
    writing_ms = 1e3 * np.concatenate([save["writing_s"] for save in saves])
    memcpy_ms = Spread([1e3 * seconds for seconds in result["memcpy_s"]])
    blocked_ms = Spread([1e3 * save["blocked_s"] for save in saves])
    return {
        "saver": result["peer"],
        "blocked_ms": blocked_ms.as_dict(),
        "memcpy_ms": memcpy_ms.as_dict(),
        "blocked_per_memcpy": blocked_ms.median / memcpy_ms.median,
        "lost_ms": Spread([1e3 * save["lost_s"] for save in saves]).as_dict(),
        "step_alone_ms": _percentiles(alone_ms),
        "step_writing_ms": _percentiles(writing_ms),
        "slower_percent": _percent_slower(saves),
        "durable_s": Spread([save["durable_s"] for save in saves]).as_dict(),
        "stored_bytes": saves[-1]["stored_bytes"],
        "idle_bytes": result["idle_bytes"],
        "peak_bytes": result["peak_bytes"],
        "first_blocked_ms": 1e3 * result["first"]["blocked_s"],
        "first_durable_s": result["first"]["durable_s"],
        "direct_io": result["direct_io"],
    }


def _percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    if milliseconds.size == 0:  # nothing ran while it was writing: it was synchronous
        return dict.fromkeys(("p50", "p99", "mean", "max"), math.nan) | {"steps": 0}
    p50, p99 = np.percentile(milliseconds, [50, 99])
    mean, peak = milliseconds.mean(), milliseconds.max()
    return {"p50": float(p50), "p99": float(p99), "mean": float(mean), "max": float(peak), "steps": milliseconds.size}


def _percent_slower(saves: list[dict[str, Any]]) -> float:
    """Median over the saves: mean step while writing against the median step right before, in percent."""
    ratios = [np.mean(save["writing_s"]) / np.median(save["alone_s"]) for save in saves if save["writing_s"]]
    return 100 * (float(np.median(ratios)) - 1) if ratios else math.nan


def _reduced(result: dict[str, Any]) -> dict[str, Any]:
    """One peer's saves for the JSON file, with percentiles in place of the single steps."""
    saves = []
    for save in result["saves"]:
        numbers = {name: value for name, value in save.items() if name not in ("alone_s", "writing_s")}
        steps = {f"step_{name}_ms": _percentiles(1e3 * np.array(save[f"{name}_s"])) for name in ("alone", "writing")}
        saves.append({**numbers, **steps})
    return {"saver": result["peer"], "saves": saves}


def _number(value: float | None) -> str:
    """Empty where there is none: JSON has null for NaN."""
    return "" if value is None or math.isnan(value) else f"{value:.1f}"


def _row(summary: dict[str, Any], reference_ms: float | None) -> list[str]:
    def spread(name: str, digits: int) -> str:
        return Spread(summary[name]["values"]).text(digits)

    alone, writing = summary["step_alone_ms"], summary["step_writing_ms"]
    ratio = summary["lost_ms"]["median"] / reference_ms if reference_ms else math.nan
    numbers = [_number(steps[name]) for name in ("p50", "p99") for steps in (alone, writing)]
    return [
        summary["saver"],
        spread("blocked_ms", 0),
        spread("memcpy_ms", 0),
        f"{summary['blocked_per_memcpy']:.2f}",
        spread("lost_ms", 0),
        f"{ratio:.2f}",
        *numbers,
        _number(summary["slower_percent"]),
        spread("durable_s", 2),
        f"{summary['stored_bytes'] / 1e6:.0f}",
        f"{summary['peak_bytes'] / 1e6:.0f}",
        f"{summary['first_blocked_ms']:.0f}",
    ]


def measure(setup: Setup) -> dict[str, Any]:
    """All peers, one after another, and what the disk takes."""
    results = []
    for peer in setup.choose(SAVERS):
        print(f"{peer} ...", file=sys.stderr, flush=True)
        results.append(run_watched(lost_time_worker.measure_peer, peer, setup, log=setup.log))
    num_bytes = results[0]["state_bytes"]
    writes = {threads: direct_write_seconds(num_bytes, setup.directory, threads) for threads in {1, available_cpus()}}
    memcpy_s = itertools.chain.from_iterable(result["memcpy_s"] for result in results)
    return {
        "state_bytes": num_bytes,
        "num_large_tensors": results[0]["num_large_tensors"],
        "memcpy_ms": Spread([1e3 * seconds for seconds in memcpy_s]).as_dict(),
        "direct_write_s": {f"{threads} threads": seconds for threads, seconds in writes.items()},
        "savers": [summarise(result) for result in results],
        "timed_saves": [_reduced(result) for result in results],
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    ours = next((saver["lost_ms"]["median"] for saver in result["savers"] if saver["saver"] == REFERENCE), None)
    print_table(_HEADER, [_row(summary, ours) for summary in result["savers"]])
    print(
        f"\nstate {result['state_bytes'] / 1e6:.0f} MB in {result['num_large_tensors']} tensors; "
        f"memcpy {Spread(result['memcpy_ms']['values']).text()} ms; raw O_DIRECT write with "
        + ", ".join(f"{name} {seconds or math.nan:.2f} s" for name, seconds in result["direct_write_s"].items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "124M"), default="124M")
    parser.add_argument("--peers", nargs="+", choices=SAVERS, default=SAVERS)
    parser.add_argument("--repetitions", type=int, default=5, help="timed saves per peer, after one warm-up")
    parser.add_argument("--alone-steps", type=int, default=150, help="steps without a save before each save")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/lost_time.json")
    arguments = parser.parse_args()

    with scratch_directory(arguments.directory) as directory:
        setup = Setup(directory, arguments.size, arguments.repetitions, arguments.peers, arguments.alone_steps)
        facts = machine_facts(directory)
        warn_if_busy(facts)
        result = measure(setup)
    show(result)
    target = write_results("lost_time", {"machine": facts, **setup.facts(), **result}, arguments.output)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
