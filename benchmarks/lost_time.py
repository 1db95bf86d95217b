"""How much training time a save costs: asyncckpt and its peers beside a launch-bound loop.

    python benchmarks/lost_time.py                  # GPT-2 124M + AdamW, 1.49 GB; about ten minutes
    python benchmarks/lost_time.py --size tiny      # seconds, and only shows that it runs

Every peer runs in a process of its own, one after another, in one run. Put ``--directory`` on the
disk that matters; nothing is left on it. README.md says what each number means.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from common import Spread, machine_facts, print_table, scratch_directory, write_results
from memory import MemoryWatch
from peers import PEERS
from probes import direct_write_seconds

_WORKER = Path(__file__).with_name("lost_time_worker.py")
_REFERENCE = "asyncckpt fast"
_HEADER = (
    "saver", "blocked ms", "memcpy ms", "x memcpy", "lost ms/save", "x ours", "p50 ms alone", "writing",
    "p99 ms alone", "writing", "slower %", "durable s", "stored MB", "peak MB", "first blocked ms",
)  # fmt: skip


def measure_peer(peer: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one worker to its end and return what it measured, memory included."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, str(_WORKER), f"--peer={peer}", f"--size={arguments.size}"]
    command += [f"--directory={directory / peer.replace(' ', '-')}", f"--report-fd={write_fd}"]
    command += [f"--repetitions={arguments.repetitions}", f"--alone-steps={arguments.alone_steps}"]
    log = directory / "worker.log"
    with log.open("w") as errors, os.fdopen(read_fd) as reports, ExitStack() as cleanup:
        worker = subprocess.Popen(command, pass_fds=[write_fd], stdout=errors, stderr=errors)
        cleanup.callback(worker.wait)
        cleanup.callback(worker.kill)
        os.close(write_fd)
        result: dict[str, Any] = {}
        for line in reports:
            message = json.loads(line)
            if message["event"] == "ready":
                with MemoryWatch(worker.pid) as watch:
                    pass
                idle_bytes = watch.peak_bytes
            elif message["event"] == "watch":
                watching = cleanup.enter_context(ExitStack())
                watch = watching.enter_context(MemoryWatch(worker.pid))
            elif message["event"] == "unwatch":
                watching.close()
            else:
                result = message["result"]
                break
        if not result or worker.wait(timeout=120) != 0:
            raise RuntimeError(f"{peer} failed:\n{log.read_text()[-4000:]}")
    return {**result, "idle_bytes": idle_bytes, "peak_bytes": watch.peak_bytes}


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


def judge(summaries: list[dict[str, Any]], reference: dict[str, Any]) -> list[dict[str, Any]]:
    """What asyncckpt promises, beside what came out."""
    dcp = [s["lost_ms"]["median"] for s in summaries if s["saver"].startswith("dcp")]
    checks = [
        ("percent by which steps are slower while writing", reference["slower_percent"], 5.0),
        ("blocked time per memcpy of the same bytes", reference["blocked_per_memcpy"], 1.5),
    ]
    if dcp:
        ratio = reference["lost_ms"]["median"] / min(dcp)
        checks.insert(0, ("lost time per lost time of the better DCP mode", ratio, 0.25))
    return [{"what": what, "value": value, "at_most": limit, "met": value <= limit} for what, value, limit in checks]


def _reduced(result: dict[str, Any]) -> dict[str, Any]:
    """One peer's repetitions for the JSON file, with percentiles in place of the single steps."""
    saves = []
    for save in result["saves"]:
        numbers = {name: value for name, value in save.items() if name not in ("alone_s", "writing_s")}
        steps = {f"step_{name}_ms": _percentiles(1e3 * np.array(save[f"{name}_s"])) for name in ("alone", "writing")}
        saves.append({**numbers, **steps})
    return {"saver": result["peer"], "saves": saves}


def _row(summary: dict[str, Any], reference_ms: float | None) -> list[str]:
    def spread(name: str, digits: int) -> str:
        return Spread(summary[name]["values"]).text(digits)

    alone, writing = summary["step_alone_ms"], summary["step_writing_ms"]
    ratio = summary["lost_ms"]["median"] / reference_ms if reference_ms else math.nan
    numbers = [f"{alone['p50']:.1f}", f"{writing['p50']:.1f}", f"{alone['p99']:.1f}", f"{writing['p99']:.1f}"]
    return [
        summary["saver"],
        spread("blocked_ms", 0),
        spread("memcpy_ms", 0),
        f"{summary['blocked_per_memcpy']:.2f}",
        spread("lost_ms", 0),
        f"{ratio:.2f}",
        *numbers,
        f"{summary['slower_percent']:.1f}",
        spread("durable_s", 2),
        f"{summary['stored_bytes'] / 1e6:.0f}",
        f"{summary['peak_bytes'] / 1e6:.0f}",
        f"{summary['first_blocked_ms']:.0f}",
    ]


def _installed(peer: str) -> bool:
    return importlib.util.find_spec(PEERS[peer].requires) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "124M"), default="124M")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repetitions", type=int, default=5, help="timed saves per peer, after one warm-up")
    parser.add_argument("--alone-steps", type=int, default=150, help="steps without a save before each save")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/lost_time.json")
    arguments = parser.parse_args()

    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        if facts["load_average"][0] > 0.5:
            print(
                f"the machine is busy: load {facts['load_average'][0]:.1f}; the numbers will not hold", file=sys.stderr
            )
        results = []
        for peer in arguments.peers:
            if not _installed(peer):
                print(f"{peer}: {PEERS[peer].requires} is not installed, left out", file=sys.stderr)
                continue
            print(f"{peer} ...", file=sys.stderr, flush=True)
            results.append(measure_peer(peer, directory, arguments))
        num_bytes = results[0]["state_bytes"]
        writes = {
            f"{threads} threads": direct_write_seconds(num_bytes, directory, threads)
            for threads in sorted({1, facts["cores"]})
        }

    summaries = [summarise(result) for result in results]
    ours = next((summary for summary in summaries if summary["saver"] == _REFERENCE), None)
    print_table(_HEADER, [_row(summary, ours["lost_ms"]["median"] if ours else None) for summary in summaries])
    memcpy_ms = Spread([1e3 * s for s in itertools.chain.from_iterable(r["memcpy_s"] for r in results)])
    print(
        f"\nstate {num_bytes / 1e6:.0f} MB in {results[0]['num_large_tensors']} tensors; memcpy {memcpy_ms.text()} ms; "
        + ", ".join(f"raw O_DIRECT write with {name} {seconds:.2f} s" for name, seconds in writes.items())
    )
    verdicts = judge(summaries, ours) if ours else []
    for verdict in verdicts:
        outcome = "met" if verdict["met"] else "MISSED"
        print(f"{verdict['what']}: {verdict['value']:.2f}, target {verdict['at_most']}: {outcome}")
    target = write_results(
        "lost_time",
        {
            "machine": facts,
            "options": vars(arguments),
            "state_bytes": num_bytes,
            "memcpy_ms": memcpy_ms.as_dict(),
            "direct_write_s": writes,
            "savers": summaries,
            "targets": verdicts,
            "repetitions": [_reduced(result) for result in results],
        },
        arguments.output,
    )
    print(f"written to {target}")


if __name__ == "__main__":
    main()
