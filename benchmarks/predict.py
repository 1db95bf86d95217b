"""How long a save blocks, takes and restores, on a machine nobody has measured: a formula, and how far it is off.

    blocked = fixed + tensors * each + bytes / copy
    durable = blocked + fixed + tensors * each + together(bytes / encode, bytes * ratio / disk)
    restore = fixed + tensors * each + together(bytes / decode, bytes * ratio / disk) + bytes / copy

``together`` is how long threads take that each fill a buffer on one of so many cores and then have the disk write it:
neither the sum nor the greater of both. At times all of them wait for the disk, and cores lie idle; at times all are
on cores, and the disk does.

Calibrated with: tensors of 1 KiB, whose bytes do not count (fixed and each); thread-seconds of encoding while every
core encodes, and the ratio, of saves with as many threads as cores (``encode``); memcpy, what the disk takes between
saves, and what it gives (``copy`` and ``disk``); restoring the trained state from the page cache (``decode``). Compared
with what was not used: how long all saves of large tensors took, and other restores. A first save also commits its
memory, and is left out on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
from common import print_table
from questions import REFERENCE

__all__ = [
    "Constants", "Machine", "Prediction", "Work", "calibrate", "check", "extrapolate", "is_possible", "measure_from",
    "predict", "show",
]  # fmt: skip

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
        encode_bytes_per_s: raw bytes that one core compresses and hashes while the others do the same, by preset.
        decode_bytes_per_s: raw bytes that one core decompresses and checks, likewise.
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
        copy_bytes_per_s: into the arena and out of it: memcpy, or from and to the GPU.
        encode_cores: cores that training leaves to the writer.
        threads: what encodes on them, and writes.
        cores: cores that decompress in a restore, with two threads each.
        write_bytes_per_s, read_bytes_per_s: of the disk, for one thread: others wait for their turn.
    """

    copy_bytes_per_s: float
    encode_cores: int
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
    from asyncckpt.format.layout import SHARD_BYTES

    num_stored = work.num_bytes * (constants.ratios[work.preset] if work.ratio is None else work.ratio)
    # A file is written by one thread, and so is read.
    num_files = max(work.num_tensors, math.ceil(work.num_bytes / SHARD_BYTES))
    copy_s = work.num_bytes / machine.copy_bytes_per_s
    blocked_s = constants.blocked.at(work.num_tensors) + copy_s
    written_s = _together_s(
        work.num_bytes / constants.encode_bytes_per_s[work.preset],
        machine.encode_cores,
        num_stored / machine.write_bytes_per_s,
        min(machine.threads, num_files),
    )
    read_s = _together_s(
        work.num_bytes / constants.decode_bytes_per_s,
        machine.cores,
        num_stored / machine.read_bytes_per_s,
        min(2 * machine.cores, num_files),
    )
    return Prediction(
        blocked_s,
        blocked_s + constants.committing.at(work.num_tensors) + written_s,
        constants.restoring.at(work.num_tensors) + read_s + copy_s,
    )


def _together_s(cpu_s: float, cores: int, disk_s: float, threads: int) -> float:
    """Seconds that *threads* need for *cpu_s* of computing, on *cores*, and *disk_s* of one disk, in turns.

    A closed queueing network of two stations whose times of service vary as exponential ones do: the model of
    machines and repairmen in textbooks of queueing theory. The sizes of files, and disks that others share, vary.
    """
    computing = [min(threads - at_disk, cores) for at_disk in range(threads + 1)]
    # How likely it is that 0, 1, 2... threads are at the disk, or wait for it, as a multiple of the likelihood of none.
    weights = list(accumulate(computing[:-1], lambda weight, num: weight * num * disk_s / cpu_s, initial=1.0))
    mean_computing = sum(map(mul, weights, computing)) / sum(weights)
    return cpu_s / mean_computing


_NO_COMPRESSION = "asyncckpt none"


def is_possible(results: Mapping[str, Any]) -> bool:
    """Whether *results* have all that `calibrate` needs."""
    needed = {"durable": _NO_COMPRESSION, "restore": REFERENCE}
    return "growth" in results and all(
        name in (saver["saver"] for saver in results.get(question, {"savers": []})["savers"])
        for question, name in needed.items()
    )


def calibrate(results: Mapping[str, Any]) -> tuple[Constants, Machine]:
    """Constants and this machine, from the results of ``growth``, ``durable`` and ``restore``."""
    growth, durable = results["growth"], results["durable"]
    counts, cores = growth["counts"], growth["machine"]["cores"]
    alike = {run["preset"]: run for run in growth["threads"] if run["threads"] == cores}
    blocked = _fit(counts, "blocked_s")
    both = _fit(counts, "durable_s")
    restoring = _fit(counts, "restore_s")
    num_bytes = durable["state_bytes"]
    limits = {name: num_bytes / seconds["median"] for name, seconds in durable["limits"].items()}
    # Taken after each save: disks change their minds within minutes.
    write_s = _named(durable["savers"], _NO_COMPRESSION)["direct_write_s"]["median"]
    warm_s = _named(results["restore"]["savers"], REFERENCE)["warm_s"]["median"]
    decode_s = warm_s - restoring.at(growth["threads"][0]["num_large"]) - num_bytes / limits["memcpy"]
    decode_s = max(decode_s, 0.1 * warm_s)  # of a tiny state, nothing may be left
    constants = Constants(
        blocked,
        Line(both.fixed_s - blocked.fixed_s, both.each_s - blocked.each_s),
        restoring,
        {preset: run["raw_bytes"] / run["encode_s"]["median"] for preset, run in alike.items()},
        num_bytes / (cores * decode_s),
        {preset: run["stored_bytes"] / run["raw_bytes"] for preset, run in alike.items()},
    )
    # Twice as many threads as cores, as writer/cores.py has it.
    return constants, Machine(limits["memcpy"], cores, 2 * cores, cores, num_bytes / write_s, limits["read, disk"])


def _named(savers: Sequence[Any], name: str) -> Any:
    return next(saver for saver in savers if saver["saver"] == name)


def _fit(counts: Sequence[Mapping[str, Any]], name: str) -> Line:
    """The line with the least sum of squares of *relative* errors."""
    seconds = np.array([count[name]["median"] for count in counts])
    tensors = np.array([count["num_tensors"] for count in counts])
    (fixed_s, each_s), *_ = np.linalg.lstsq(
        np.stack([1 / seconds, tensors / seconds], axis=1), np.ones(len(seconds)), rcond=None
    )
    return Line(float(fixed_s), float(each_s))


def check(results: Mapping[str, Any], constants: Constants, machine: Machine) -> list[dict[str, Any]]:
    """The formula beside what was measured and not used to calibrate it; saves after the first, restores of any."""
    growth, state_bytes = results["growth"], results["durable"]["state_bytes"]
    num_large = growth["threads"][0]["num_large"]
    cached = replace(machine, read_bytes_per_s=math.inf)
    rows = []

    def compare(what: str, work: Work, here: Machine, measured: Mapping[str, float | None]) -> None:
        predicted = asdict(predict(work, here, constants))
        rows.extend(
            {
                "what": what,
                "of": name,
                "predicted_s": predicted[name],
                "measured_s": seconds,
                "error": predicted[name] / seconds - 1,
            }
            for name, seconds in measured.items()
            if seconds is not None
        )

    for size in growth["sizes"]:
        work = Work(size["num_bytes"], 1, "fast", size["stored_bytes"] / size["num_bytes"])
        what = f"one tensor of {size['num_bytes'] / 1e9:g} GB"
        compare(what, work, cached, {**_medians(size), "restore_s": size["restore_s"]})
    for run in growth["threads"]:
        here = replace(machine, encode_cores=min(run["threads"], machine.cores), threads=run["threads"])
        what = f"trained, {run['preset']}, threads={run['threads']}"
        compare(what, Work(run["raw_bytes"], num_large, run["preset"]), here, _medians(run))
    for saver in results["durable"]["savers"]:
        name, _, preset = saver["saver"].partition(" ")
        if name == "asyncckpt":
            compare(f"trained, {preset}", Work(state_bytes, num_large, preset), machine, _medians(saver))
    for saver in results["restore"]["savers"]:
        name, _, preset = saver["saver"].partition(" ")
        if name == "asyncckpt":
            work = Work(state_bytes, num_large, preset)
            if saver["saver"] != REFERENCE:
                compare(f"trained, {preset}, page cache", work, cached, {"restore_s": saver["warm_s"]["median"]})
            compare(f"trained, {preset}, disk", work, machine, {"restore_s": saver["cold_s"]["median"]})
    return rows


def _medians(measured: Mapping[str, Any]) -> dict[str, float]:
    return {name: measured[name]["median"] for name in ("blocked_s", "durable_s")}


_GPUS, _CORES = 8, 16
_STORAGE = {"NVMe, 6 GB/s": 6e9, "network disk, 1 GB/s": 1e9}
_GPU_COPY_BYTES_PER_S = 20e9  # PCIe 4 x16 into pinned memory; an assumption, not measured here
_MODEL_BYTES = 7_000_000_000 * 14  # 7 billion parameters: bfloat16 weights, float32 master weights and two moments
_TENSORS = 1_200


def extrapolate(constants: Constants) -> list[dict[str, Any]]:
    """A node of eight GPUs, each process with its share of the state, the cores and the disk."""
    cores = _CORES // _GPUS
    encode_cores = max(1, cores - 1)  # one launches kernels
    rows = []
    for storage, speed in _STORAGE.items():
        machine = Machine(_GPU_COPY_BYTES_PER_S, encode_cores, 2 * cores, cores, speed / _GPUS, speed / _GPUS)
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
    print("Saves after the first, which also commits its memory:\n")
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
