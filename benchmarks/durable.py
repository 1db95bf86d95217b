"""How long until a save is durable while the trainer is idle, and how many bytes it takes on disk."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import states
from common import Spread, available_cpus, print_table, stored_bytes
from memory import return_freed_memory
from peers import PEERS
from probes import (
    buffered_write_seconds,
    codec_seconds,
    direct_write_seconds,
    drop_from_page_cache,
    memcpy_seconds,
    read_seconds,
)
from questions import REFERENCE, Setup
from workers import Tell, run_in_process

TITLE = "Until durable with an idle trainer, and bytes on disk"
SAVERS = (
    "torch.save", "dcp.save",  "torch_checkpointing", "safetensors", "tensorstore",
    "asyncckpt fast", "asyncckpt none", "asyncckpt small",
)  # fmt: skip
_PRESETS = ("fast", "small")
_FEW = 3  # repetitions of raw limits that only put the numbers in perspective


def save_repeatedly(tell: Tell, peer: str, spec: str, setup: Setup) -> dict[str, Any]:
    """Save so many times and delete each, after one that does not count; each writes every byte."""
    directory = setup.place(peer)
    directory.mkdir()
    state = states.make_state(spec)
    return_freed_memory()
    saver = PEERS[peer](directory, state)
    blocked_s, durable_s, direct_s = [], [], []
    for step in range(setup.repetitions + 1):
        started = time.perf_counter()
        pending = saver.save(step)
        blocked_s.append(time.perf_counter() - started)
        pending.wait()
        durable_s.append(pending.durable_at - started)
        num_stored = stored_bytes(saver.path(step))
        saver.discard(step)
        os.sync()
        if peer == "asyncckpt none":  # disks change their minds: compare with what this one takes right now
            direct_s.append(direct_write_seconds(state.num_bytes, directory, 1))
    saver.close()
    shutil.rmtree(directory)
    return {
        "saver": peer,
        "state_bytes": state.num_bytes,
        "stored_bytes": num_stored,
        "blocked_s": Spread(blocked_s[1:]).as_dict(),
        "durable_s": Spread(durable_s[1:]).as_dict(),
        "direct_write_s": Spread(direct_s[1:]).as_dict() if direct_s else None,
    }


def store_kinds(tell: Tell, setup: Setup) -> dict[str, Any]:
    """Stored bytes per raw byte, by kind of state, preset and part; and what one core needs for the codecs."""
    ratios: dict[str, Any] = {}
    for kind, spec in (("fp32", setup.size), ("bf16", f"{setup.size} bf16")):
        state = states.make_state(spec)
        if kind == "fp32":
            codecs = _codec_speeds(state)
        for preset in _PRESETS:
            ratios.setdefault(kind, {})[preset] = states.stored_ratios(state, preset, setup.place(f"kinds {kind}"))
    return {"ratios": ratios, "codec_bytes_per_s": codecs}


def _codec_speeds(state: states.State) -> dict[str, float]:
    largest = max(state.tensors(), key=lambda tensor: tensor.nbytes)
    speeds = {}
    for preset, cname in zip(_PRESETS, ("lz4", "zstd"), strict=True):
        for name, seconds in codec_seconds(largest, preset, _FEW).items():
            speeds[f"{cname} {name}"] = largest.nbytes / Spread(seconds).median
    return speeds


def raw_limits(tell: Tell, num_bytes: int, setup: Setup) -> dict[str, Any]:
    """Seconds that the machine needs for as many bytes, without any saver."""
    path = setup.directory / "probe"
    tensors = states.make_state(setup.size).tensors()
    limits = {"memcpy": Spread(memcpy_seconds(tensors, setup.repetitions))}
    for threads in sorted({1, available_cpus()}):
        limits[f"O_DIRECT write, {threads} threads"] = Spread(
            [direct_write_seconds(num_bytes, setup.directory, threads) for _ in range(_FEW)]
        )
    limits["buffered write and fsync"] = Spread([buffered_write_seconds(num_bytes, path) for _ in range(_FEW)])
    limits["read, page cache"] = Spread([read_seconds(path) for _ in range(_FEW)])
    cold_s = []
    for _ in range(_FEW):
        drop_from_page_cache(path, wholly=False)
        cold_s.append(read_seconds(path))
    limits["read, disk"] = Spread(cold_s)
    path.unlink()
    return {name: spread.as_dict() for name, spread in limits.items()}


def measure(setup: Setup) -> dict[str, Any]:
    """All savers, one after another, kinds of states, and raw limits."""
    savers = [run_in_process(save_repeatedly, peer, setup.size, setup, log=setup.log) for peer in setup.choose(SAVERS)]
    num_bytes = savers[0]["state_bytes"]
    return {
        "state_bytes": num_bytes,
        "savers": savers,
        "limits": run_in_process(raw_limits, num_bytes, setup, log=setup.log),
        **run_in_process(store_kinds, setup, log=setup.log),
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    num_bytes = result["state_bytes"]
    ours = next((saver["durable_s"]["median"] for saver in result["savers"] if saver["saver"] == REFERENCE), None)
    rows = []
    for saver in result["savers"]:
        durable = Spread(saver["durable_s"]["values"])
        rows.append(
            [
                saver["saver"],
                Spread([1e3 * seconds for seconds in saver["blocked_s"]["values"]]).text(),
                durable.text(2),
                f"{num_bytes / durable.median / 1e9:.2f}",
                f"{durable.median / ours:.2f}" if ours else "",
                f"{saver['stored_bytes'] / 1e6:.0f}",
            ]
        )
    print_table(("saver", "blocked ms", "durable s", "GB/s", "x ours", "stored MB"), rows)
    print()
    limits = [
        [name, Spread(seconds["values"]).text(3), f"{num_bytes / seconds['median'] / 1e9:.2f}"]
        for name, seconds in result["limits"].items()
    ]
    codecs = [[f"one core, {name}", "", f"{speed / 1e9:.2f}"] for name, speed in result["codec_bytes_per_s"].items()]
    print_table(("raw limits of the same bytes", "s", "GB/s"), [*limits, *codecs])
    print()
    rows = [
        [f"{kind}, {preset}", *(f"{ratios[part]:.3f}" for part in ("model", "optimizer", "all"))]
        for kind, presets in result["ratios"].items()
        for preset, ratios in presets.items()
    ]
    print_table(("stored per raw byte", "weights", "moments", "all"), rows)
