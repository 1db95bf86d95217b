"""What asyncckpt promises about speed and size, and whether a run kept it. The only place with limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common import print_table

__all__ = ["TARGETS", "Target", "judge", "show"]

Results = Mapping[str, Any]
"""What the questions found, by the name of the question."""

_MIB = 2**20


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        what: in words, with its unit.
        question: whose results it needs.
        measure: the number, from those results; raises `LookupError` when something was left out.
        sense: on which side of *limit* it has to be.
        limit: the promise.
    """

    what: str
    question: str
    measure: Callable[[Any], float]
    sense: Literal["<=", ">="]
    limit: float

    def is_met(self, value: float) -> bool:
        """Whether *value* keeps the promise."""
        return value <= self.limit if self.sense == "<=" else value >= self.limit


def _named(savers: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(saver for saver in savers if saver["saver"] == name)


def _ours(result: Any, preset: str = "fast") -> dict[str, Any]:
    return _named(result["savers"], f"asyncckpt {preset}")


def _lost_ratio(result: Any, prefix: str) -> float:
    peers = [
        saver["lost_ms"]["median"]
        for saver in result["savers"]
        if saver["saver"].startswith(prefix) and not saver["saver"].startswith("asyncckpt")
    ]
    return float(_ours(result)["lost_ms"]["median"] / min(peers))


def _step_ratio(result: Any, percentile: str) -> float:
    ours = _ours(result)
    return float(ours["step_writing_ms"][percentile] / ours["step_alone_ms"][percentile])


def _extra_memory_mib(saved: dict[str, Any], num_bytes: int) -> float:
    return (saved["peak_bytes"] - saved["idle_bytes"] - num_bytes) / _MIB


def _direct_ratio(result: Any) -> float:
    none = _ours(result, "none")
    return float(none["direct_write_s"]["median"] / none["durable_s"]["median"])


def _logical_gb_per_s(result: Any) -> float:
    return float(result["state_bytes"] / _ours(result)["durable_s"]["median"] / 1e9)


def _restore_ratio(result: Any, name: str) -> float:
    """Seconds of torch.load and copy per second of ours."""
    return float(_named(result["savers"], "torch.save")[name]["median"] / _ours(result)[name]["median"])


def _one_tensor_ms(result: Any, which: str) -> float:
    """Milliseconds beyond what the bytes of the tensor take at the speed of restoring everything."""
    ours = _ours(result)
    one = ours["one"][which]
    return 1e3 * float(one["seconds"]["median"] - one["num_bytes"] * ours["warm_s"]["median"] / result["state_bytes"])


def _per_tensor_us(result: Any, name: str) -> float:
    return 1e6 * float(_ours(result)[name]["median"]) / int(result["num_tensors"])


def _largest(result: Any) -> float:
    largest = next(size for size in result["sizes"] if size["num_bytes"] == 8_000_000_000)
    return _extra_memory_mib(largest, largest["num_bytes"])


TARGETS = (
    Target("lost time per lost time of DCP's better async mode", "lost_time",
           lambda result: _lost_ratio(result, "dcp.async"), "<=", 1 / 8),
    Target("lost time per lost time of the next best peer", "lost_time",
           lambda result: _lost_ratio(result, ""), "<=", 1 / 2),
    Target("save() blocks, per memcpy", "lost_time", lambda result: _ours(result)["blocked_per_memcpy"], "<=", 1.2),
    Target("step p50 while writing, per p50 alone", "lost_time",
           lambda result: _step_ratio(result, "p50"), "<=", 1.03),
    Target("step p99 while writing, per p99 alone", "lost_time",
           lambda result: _step_ratio(result, "p99"), "<=", 1.10),
    Target("uncompressed until durable, share of raw O_DIRECT speed", "durable", _direct_ratio, ">=", 0.9),
    Target("fast until durable, idle trainer: logical GB/s", "durable", _logical_gb_per_s, ">=", 1.0),
    *(
        Target(f"stored per raw byte: {preset}, {label}", "durable",
               lambda result, kind=kind, preset=preset, part=part: result["ratios"][kind][preset][part], "<=", limit)
        for preset, label, kind, part, limit in (
            ("fast", "fp32 weights and moments", "fp32", "all", 0.87),
            ("fast", "bf16 weights", "bf16", "model", 0.76),
            ("small", "fp32 weights and moments", "fp32", "all", 0.82),
            ("small", "bf16 weights", "bf16", "model", 0.69),
        )
    ),
    Target("restore, page cache: times as fast as torch.load and copy", "restore",
           lambda result: _restore_ratio(result, "warm_s"), ">=", 1.0),
    Target("restore, cold: times as fast as torch.load and copy", "restore",
           lambda result: _restore_ratio(result, "cold_s"), ">=", 1.3),
    *(
        Target(f"one tensor of {label}: ms beyond its bytes", "restore",
               lambda result, which=which: _one_tensor_ms(result, which), "<=", 5.0)
        for which, label in (("small", "3 KB"), ("large", "9.4 MB"))
    ),
    Target("10,000 x 1 KiB: save, us each", "many_tensors",
           lambda result: _per_tensor_us(result, "durable_s"), "<=", 100.0),
    Target("10,000 x 1 KiB: restore, us each", "many_tensors",
           lambda result: _per_tensor_us(result, "restore_s"), "<=", 60.0),
    Target("10,000 x 1 KiB: save() blocks, ms", "many_tensors",
           lambda result: 1e3 * _ours(result)["blocked_s"]["median"], "<=", 50.0),
    Target("one tensor of 8 GB: memory beyond one copy, MiB", "growth", _largest, "<=", 256.0),
    Target("writer resident without the arena, at its peak, MB", "overhead",
           lambda result: result["writer"]["peak_bytes"] / 1e6, "<=", 80.0),
    Target("writer warm after, s", "overhead", lambda result: result["warm_s"]["median"], "<=", 0.5),
    Target("import asyncckpt beyond torch, ms", "overhead",
           lambda result: result["import_ms"]["median"], "<=", 30.0),
    Target("import asyncckpt and first use of Checkpointer, ms", "overhead",
           lambda result: result["import_ms"]["median"] + result["first_use_ms"]["median"], "<=", 30.0),
    Target("peak memory of a save beyond one copy, MiB", "lost_time",
           lambda result: _extra_memory_mib(_ours(result), result["state_bytes"]), "<=", 256.0),
    Target("memory growing over 200 saves, MiB", "overhead",
           lambda result: result["many"]["growth_bytes"] / _MIB, "<=", 1.0),
)  # fmt: skip
"""Every promise. 1 MiB over 200 saves is what "does not grow" means here: the noise of allocators."""


def judge(results: Results) -> list[dict[str, Any]]:
    """Each target beside what *results* say; the value is None where its question was not asked."""
    verdicts = []
    for target in TARGETS:
        try:
            value = float(target.measure(results[target.question]))
        except (LookupError, StopIteration, ValueError):
            value = math.nan
        known = not math.isnan(value)
        verdicts.append(
            {
                "what": target.what,
                "value": value if known else None,
                "sense": target.sense,
                "limit": target.limit,
                "met": target.is_met(value) if known else None,
                "per_limit": value / target.limit if known else None,
            }
        )
    return verdicts


def show(verdicts: list[dict[str, Any]]) -> None:
    """Print the table."""
    rows = []
    for verdict in verdicts:
        known = verdict["value"] is not None
        outcome = "not measured" if not known else "met" if verdict["met"] else f"MISSED: x {verdict['per_limit']:.2f}"
        value = f"{verdict['value']:.3g}" if known else ""
        rows.append([verdict["what"], value, f"{verdict['sense']} {verdict['limit']:.3g}", outcome])
    print_table(("target", "measured", "limit", ""), rows)
