"""How long a save blocks, takes and restores, on a machine nobody has measured: a formula, and how far it is off.

    blocked = fixed + tensors * each + bytes / copy
    durable = blocked + fixed + tensors * each + max(bytes / (threads * encode), bytes * ratio / disk)
    restore = fixed + tensors * each + max(bytes / (cores * decode), bytes * ratio / disk)

The fixed and per-tensor costs are fitted to saves of tensors of 1 KiB, where bytes do not count. ``encode`` and
``ratio`` come from saves with one thread, ``copy`` and ``disk`` from the raw limits of the same run, ``decode`` from
restoring one tensor of 1 GB. What is compared afterwards, other sizes, other numbers of threads and the trained state,
was not used for any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from common import print_table

__all__ = ["Constants", "Machine", "Prediction", "Work", "calibrate", "check", "extrapolate", "predict"]

TITLE = "A formula for other machines"


@dataclass(frozen=True)
class Line:
    """Seconds of *n* tensors: ``fixed_s + n * each_s``."""

    fixed_s: float
    each_s: float

    def at(self, num_tensors: int) -> float:
        return self.fixed_s + num_tensors * self.each_s


@dataclass(frozen=True)
class Constants:
    """What the package costs, whatever the machine has by way of disks.

    Attributes:
        blocked, committing, restoring: seconds by number of tensors.
        encode_bytes_per_s: raw bytes that one core compresses and hashes, by preset.
        decode_bytes_per_s: raw bytes that one core decompresses and checks.
        ratios: stored bytes per raw byte, by preset.
    """

    blocked: Line
    committing: Line
    restoring: Line
    encode_bytes_per_s: Mapping[str, float]
    decode_bytes_per_s: float
    ratios: Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """What one training process may use: its share of the machine.

    Attributes:
        copy_bytes_per_s: into the arena: memcpy, or from the GPU.
        threads: cores that compress during training.
        cores: cores that decompress in a restore.
        write_bytes_per_s, read_bytes_per_s: of the disk.
    """

    copy_bytes_per_s: float
    threads: int
    cores: int
    write_bytes_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True)
class Work:
    """What is saved."""

    num_bytes: int
    num_tensors: int
    preset: str = "fast"
    ratio: float | None = None


@dataclass(frozen=True)
class Prediction:
    """Seconds."""

    blocked_s: float
    durable_s: float
    restore_s: float


def predict(work: Work, machine: Machine, constants: Constants) -> Prediction:
    """The formula."""
    num_stored = work.num_bytes * (constants.ratios[work.preset] if work.ratio is None else work.ratio)
    blocked_s = constants.blocked.at(work.num_tensors) + work.num_bytes / machine.copy_bytes_per_s
    encode_s = work.num_bytes / (machine.threads * constants.encode_bytes_per_s[work.preset])
    decode_s = work.num_bytes / (machine.cores * constants.decode_bytes_per_s)
    return Prediction(
        blocked_s,
        blocked_s + constants.committing.at(work.num_tensors) + max(encode_s, num_stored / machine.write_bytes_per_s),
        constants.restoring.at(work.num_tensors) + max(decode_s, num_stored / machine.read_bytes_per_s),
    )


def calibrate(results: Mapping[str, Any]) -> tuple[Constants, Machine]:
    """Constants and this machine, from the results of ``growth`` and ``durable``."""
    growth, durable = results["growth"], results["durable"]
    counts = growth["counts"]
    alone = {run["preset"]: run for run in growth["threads"] if run["threads"] == 1}
    blocked = _fit(counts, "blocked_s")
    both = _fit(counts, "durable_s")
    first = next(size for size in growth["sizes"] if size["restore_s"])
    cores = max(run["threads"] for run in growth["threads"])
    num_bytes = durable["state_bytes"]
    constants = Constants(
        blocked,
        Line(both.fixed_s - blocked.fixed_s, both.each_s - blocked.each_s),
        _fit(counts, "restore_s"),
        {preset: run["raw_bytes"] / run["encode_s"]["median"] for preset, run in alone.items()},
        first["num_bytes"] / (cores * first["restore_s"]),
        {preset: run["stored_bytes"] / run["raw_bytes"] for preset, run in alone.items()},
    )
    limits = {name: num_bytes / seconds["median"] for name, seconds in durable["limits"].items()}
    write = max(speed for name, speed in limits.items() if name.startswith("O_DIRECT"))
    return constants, Machine(limits["memcpy"], cores, cores, write, limits["read, page cache"])


def _fit(counts: Sequence[Mapping[str, Any]], name: str) -> Line:
    """The line with the least sum of squares of *relative* errors."""
    seconds = np.array([count[name]["median"] for count in counts])
    tensors = np.array([count["num_tensors"] for count in counts])
    (fixed_s, each_s), *_ = np.linalg.lstsq(
        np.stack([1 / seconds, tensors / seconds], axis=1), np.ones(len(seconds)), rcond=None
    )
    return Line(float(fixed_s), float(each_s))


def check(results: Mapping[str, Any], constants: Constants, machine: Machine) -> list[dict[str, Any]]:
    """The formula beside what was measured and not used to calibrate it."""
    found = []
    for size in results["growth"]["sizes"]:
        ratio = size["stored_bytes"] / size["num_bytes"]
        predicted = predict(Work(size["num_bytes"], 1, "fast", ratio), machine, constants)
        found += _compare(f"one tensor of {size['num_bytes'] / 1e9:g} GB", predicted, size)
    for run in results["growth"]["threads"]:
        if run["threads"] > 1:
            here = Machine(machine.copy_bytes_per_s, run["threads"], machine.cores, machine.write_bytes_per_s, 1.0)
            predicted = predict(Work(run["raw_bytes"], run["num_large"], run["preset"]), here, constants)
            found += _compare(f"trained, {run['preset']}, {run['threads']} threads", predicted, run)
    for saver in results["durable"]["savers"]:
        name, _, preset = saver["saver"].partition(" ")
        if name == "asyncckpt":
            work = Work(saver["state_bytes"], results["growth"]["threads"][0]["num_large"], preset)
            found += _compare(
                f"trained, {preset}, as many threads as it takes", predict(work, machine, constants), saver
            )
    return found


def _compare(what: str, predicted: Prediction, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name in ("blocked_s", "durable_s"):
        seconds = measured[name]["median"]
        guess = getattr(predicted, name)
        rows.append(
            {"what": what, "of": name, "predicted_s": guess, "measured_s": seconds, "error": guess / seconds - 1}
        )
    return rows


_GPUS, _CORES = 8, 16
_STORAGE = {"NVMe, 6 GB/s": 6e9, "network disk, 1 GB/s": 1e9}
_GPU_COPY_BYTES_PER_S = 20e9  # PCIe 4 x16 into pinned memory; an assumption, not measured here
_MODEL_BYTES = 7_000_000_000 * 14  # 7 billion parameters: bfloat16 weights, float32 master weights and two moments
_TENSORS = 1_200


def extrapolate(constants: Constants) -> list[dict[str, Any]]:
    """A node of eight GPUs, each process with its share of the state, the cores and the disk."""
    # One core of its share launches kernels.
    threads = max(1, (_CORES - _GPUS) // _GPUS)
    rows = []
    for storage, speed in _STORAGE.items():
        machine = Machine(_GPU_COPY_BYTES_PER_S, threads, _CORES // _GPUS, speed / _GPUS, speed / _GPUS)
        for preset in constants.ratios:
            seconds = predict(Work(_MODEL_BYTES // _GPUS, _TENSORS, preset), machine, constants)
            rows.append({"storage": storage, "preset": preset, **asdict(seconds)})
    return rows


def measure_from(results: Mapping[str, Any]) -> dict[str, Any]:
    """The formula, its errors and what it says of a node; from other questions' results."""
    constants, machine = calibrate(results)
    return {
        "constants": asdict(constants),
        "machine": asdict(machine),
        "checks": check(results, constants, machine),
        "node": extrapolate(constants),
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        [f"{row['what']}: {row['of']}", f"{row['predicted_s']:.3f}", f"{row['measured_s']:.3f}", f"{row['error']:+.0%}"]
        for row in result["checks"]
    ]
    print_table(("", "predicted", "measured", "error"), rows)
    print()
    rows = [
        [
            f"{row['storage']}, {row['preset']}",
            *(f"{row[name]:.2f}" for name in ("blocked_s", "durable_s", "restore_s")),
        ]
        for row in result["node"]
    ]
    print_table(
        (f"{_CORES} cores, {_GPUS} GPUs, {_MODEL_BYTES / 1e9:.0f} GB", "blocked s", "durable s", "restore s"), rows
    )
