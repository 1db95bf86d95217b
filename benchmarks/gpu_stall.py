"""What a save costs a training run on a GPU: asyncckpt in each of its modes, and its peers.

    python benchmarks/gpu_stall.py                  # GPT-2 XL, 15.6 GB; needs about 40 GB on the GPU
    python benchmarks/gpu_stall.py --size 124M      # on a smaller one
    python benchmarks/gpu_stall.py --size tiny --device cpu     # shows that it runs; its numbers mean nothing

Every saver runs in a process of its own, one after another, in one run. README.md says what each number means.
Without a CUDA device it ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Spread, machine_facts, print_table, scratch_directory, write_results
from gpu_peers import GPU_PEERS
from gpu_state import GPU_SIZES
from peers import installed

__all__ = ["judge", "summarise"]

_WORKER = Path(__file__).with_name("gpu_stall_worker.py")
_HEADER = (
    "saver", "blocked ms", "GPU idle ms", "% of a step", "step ms alone", "slower % while saving", "lost ms/save",
    "copy GB/s", "% of raw", "durable s", "old values",
)  # fmt: skip
_NO_CUDA = 2


def measure_peer(peer: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one worker to its end and return what it measured."""
    command = [sys.executable, str(_WORKER), f"--peer={peer}", f"--size={arguments.size}"]
    command += [f"--device={arguments.device}", f"--directory={directory / peer.replace(' ', '-')}"]
    command += [f"--repetitions={arguments.repetitions}", f"--alone-steps={arguments.alone_steps}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{peer} failed:\n{ended.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the table, from the repetitions of one saver. Times of the device in ms."""
    saves = result["saves"]
    step_ms = 1e3 * statistics.median(seconds for save in saves for seconds in save["alone_s"])
    idle_ms = Spread([max(0.0, 1e3 * (save["gap_s"] - save["other_gaps_s"])) for save in saves])
    slower = [
        100 * (statistics.mean(save["during_s"]) / statistics.median(save["alone_s"]) - 1)
        for save in saves
        if save["during_s"]
    ]
    rates = [save["copy_bytes_per_s"] for save in saves if save["copy_bytes_per_s"] is not None]
    copy = statistics.median(rates) if rates else math.nan
    return {
        "saver": result["saver"],
        "blocked_ms": Spread([1e3 * save["blocked_s"] for save in saves]).as_dict(),
        "idle_ms": idle_ms.as_dict(),
        "idle_percent_of_step": 100 * idle_ms.median / step_ms,
        "step_ms": step_ms,
        "slower_percent": statistics.median(slower) if slower else math.nan,
        "lost_ms": Spread([1e3 * save["lost_s"] for save in saves]).as_dict(),
        "copy_bytes_per_s": copy,
        "copy_percent_of_raw": 100 * copy / result["raw_copy_bytes_per_s"],
        "raw_copy_bytes_per_s": result["raw_copy_bytes_per_s"],
        "durable_s": Spread([save["durable_s"] for save in saves]).as_dict(),
        "stale_fraction": result["stale_fraction"],
        "peak_device_bytes": result["peak_device_bytes"],
        "first_blocked_ms": 1e3 * result["first"]["blocked_s"],
    }


def judge(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What asyncckpt promises, beside what came out for its mode with the least lost time."""
    ours = [summary for summary in summaries if summary["saver"].startswith("asyncckpt")]
    # torch.save stops training, and what copies values of another moment is no peer: its saves are torn.
    peers = [
        summary
        for summary in summaries
        if not summary["saver"].startswith(("asyncckpt", "torch.save")) and not summary["stale_fraction"]
    ]
    if not ours:
        return []
    best = min(ours, key=lambda summary: float(summary["lost_ms"]["median"]))
    checks = [
        ("host blocked, ms", best["blocked_ms"]["median"], 5.0),
        ("GPU idle per save, percent of a step", best["idle_percent_of_step"], 1.0),
        ("raw pinned bandwidth missed by the copy, percent", 100 - best["copy_percent_of_raw"], 10.0),
        ("fraction of old values in a snapshot", best["stale_fraction"], 0.0),
    ]
    peer_ms = min((float(summary["lost_ms"]["median"]) for summary in peers), default=0.0)
    if peer_ms > 0:
        checks.append(("training time lost per that of the best peer", best["lost_ms"]["median"] / peer_ms, 0.1))
    return [
        {"what": what, "saver": best["saver"], "value": value, "at_most": limit, "met": bool(value <= limit)}
        for what, value, limit in checks
    ]


def _row(summary: Mapping[str, Any]) -> list[str]:
    def spread(name: str, digits: int) -> str:
        return Spread(summary[name]["values"]).text(digits)

    stale = summary["stale_fraction"]
    return [
        summary["saver"],
        spread("blocked_ms", 1),
        spread("idle_ms", 1),
        f"{summary['idle_percent_of_step']:.1f}",
        f"{summary['step_ms']:.1f}",
        f"{summary['slower_percent']:.1f}",
        spread("lost_ms", 0),
        f"{summary['copy_bytes_per_s'] / 1e9:.1f}",
        f"{summary['copy_percent_of_raw']:.0f}",
        spread("durable_s", 2),
        "?" if stale is None else f"{100 * stale:.0f} %",
    ]


def _device_facts(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"name": "none: CPU"}
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=GPU_SIZES, default="1558M")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only shows that it runs")
    parser.add_argument("--peers", nargs="+", choices=GPU_PEERS, default=list(GPU_PEERS))
    parser.add_argument("--repetitions", type=int, default=3, help="timed saves per saver, after one warm-up")
    parser.add_argument("--alone-steps", type=int, default=15, help="steps without a save before each save")
    parser.add_argument("--directory", help="where to write; default: here")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/gpu_stall.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_stall measures a CUDA device, and this machine has none", file=sys.stderr)
        return _NO_CUDA

    results = []
    with scratch_directory(arguments.directory) as directory:
        facts = machine_facts(directory)
        for peer in installed(arguments.peers, GPU_PEERS):
            print(f"{peer} ...", file=sys.stderr, flush=True)
            results.append(measure_peer(peer, directory, arguments))
    summaries = [summarise(result) for result in results]
    print_table(_HEADER, [_row(summary) for summary in summaries])
    verdicts = judge(summaries)
    for verdict in verdicts:
        outcome = "met" if verdict["met"] else "MISSED"
        print(f"{verdict['saver']}: {verdict['what']}: {verdict['value']:.2f}, at most {verdict['at_most']}: {outcome}")
    target = write_results(
        "gpu_stall",
        {
            "machine": facts,
            "device": _device_facts(arguments.device),
            "options": vars(arguments),
            "state_bytes": results[0]["state_bytes"] if results else 0,
            "savers": summaries,
            "targets": verdicts,
            "repetitions": results,
        },
        arguments.output,
    )
    print(f"written to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
