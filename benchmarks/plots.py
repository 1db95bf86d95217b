"""Pictures of what the suite found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
from matplotlib import pyplot

__all__ = ["draw"]


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """One picture per question that has an answer in *results*."""
    drawn = []
    for name, paint in (
        ("lost_time", _lost_time), ("durable", _durable), ("restore", _restore), ("growth", _growth),
    ):  # fmt: skip
        if name in results:
            path = directory / f"{name}.png"
            paint(results[name])
            # No time and no version in the file: the same numbers make the same picture.
            pyplot.savefig(path, dpi=110, metadata={"Software": None})
            pyplot.close("all")
            drawn.append(path)
    return drawn


def _bars(axes: Any, savers: list[dict[str, Any]], name: str, label: str, scale: float = 1.0) -> None:
    shown = [(saver["saver"], saver[name]) for saver in reversed(savers)]
    medians = [scale * spread["median"] for _, spread in shown]
    errors = [
        [scale * (spread["median"] - spread["min"]) for _, spread in shown],
        [scale * (spread["max"] - spread["median"]) for _, spread in shown],
    ]
    colors = ["tab:orange" if who.startswith("asyncckpt") else "tab:gray" for who, _ in shown]
    axes.barh([who for who, _ in shown], medians, xerr=errors, color=colors, capsize=3)
    axes.set_xlabel(label)


def _lost_time(result: dict[str, Any]) -> None:
    _, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    _bars(axes, result["savers"], "lost_ms", "training time lost per save, ms (median, range)")
    axes.set_xscale("symlog", linthresh=10)


def _durable(result: dict[str, Any]) -> None:
    _, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    _bars(axes, result["savers"], "durable_s", "until durable, idle trainer, s (median, range)")


def _restore(result: dict[str, Any]) -> None:
    _, both = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, name, label in zip(both, ("warm_s", "cold_s"), ("page cache", "disk"), strict=True):
        _bars(axes, result["savers"], name, f"restore in place, {label}, s (median, range)")


def _growth(result: dict[str, Any]) -> None:
    _, (by_size, by_count, by_threads) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    sizes = [size["num_bytes"] / 1e9 for size in result["sizes"]]
    for name in ("blocked_s", "durable_s"):
        by_size.plot(sizes, [size[name]["median"] for size in result["sizes"]], "o-", label=name)
    restored = [(size["num_bytes"] / 1e9, size["restore_s"]) for size in result["sizes"] if size["restore_s"]]
    by_size.plot(*zip(*restored, strict=True), "o-", label="restore_s")
    by_size.set_xlabel("GB, one tensor")
    counts = [count["num_tensors"] for count in result["counts"]]
    for name in ("blocked_s", "durable_s", "restore_s"):
        by_count.plot(counts, [count[name]["median"] for count in result["counts"]], "o-", label=name)
    by_count.set(xscale="log", yscale="log", xlabel="tensors of 1 KiB")
    fast = [run for run in result["threads"] if run["preset"] == "fast"]
    by_threads.bar([str(run["threads"]) for run in fast], [run["durable_s"]["median"] for run in fast])
    by_threads.set_xlabel("encode threads")
    for axes in (by_size, by_count):
        axes.legend()
    by_size.set_ylabel("s")
