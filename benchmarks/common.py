"""What every benchmark shares: the machine it ran on, where results go, and how a table is printed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = [
    "REPOSITORY", "RESULTS", "Spread", "available_cpus", "machine_facts", "plain", "print_table", "scratch_directory",
    "seconds_of", "stored_bytes", "warn_if_busy", "write_results",
]  # fmt: skip

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
# The checkout these files are part of is what they measure, installed or not.
sys.path.insert(0, str(REPOSITORY))
_PACKAGES = ("asyncckpt", "torch", "torch_checkpointing", "safetensors", "zarr", "numcodecs", "tensorstore", "numpy")


class Spread:
    """Median and range of a handful of repetitions: what to compare, and how far to trust it."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, Any]:
        """JSON form: the median, the range and the repetitions themselves."""
        return {"median": self.median, "min": min(self.values), "max": max(self.values), "values": self.values}

    def text(self, digits: int = 0) -> str:
        """``median (min-max)``."""
        return f"{self.median:.{digits}f} ({min(self.values):.{digits}f}-{max(self.values):.{digits}f})"


def machine_facts(directory: Path) -> dict[str, Any]:
    """Everything a reader needs to judge a number: processor, memory, kernel, file system, versions, commit.

    Args:
        directory: where the benchmark writes; its file system is recorded.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": available_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "filesystem": _file_system(directory),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "load_average": list(os.getloadavg()),
    }


def available_cpus() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def warn_if_busy(facts: Mapping[str, Any]) -> None:
    """Tell when something else runs on the machine that *facts* are about."""
    if facts["load_average"][0] > 0.5:
        print(f"the machine is busy: load {facts['load_average'][0]:.1f}; the numbers will not hold", file=sys.stderr)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(directory: Path) -> dict[str, str]:
    """Type, device and options of the mount that holds *directory*."""
    best: tuple[str, list[str]] = ("", [])
    resolved = str(directory.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        point = fields[1].rstrip("/") + "/"
        if (resolved + "/").startswith(point) and len(point) > len(best[0]):
            best = (point, fields)
    device, _, kind, options = best[1][:4]
    return {"type": kind, "device": device, "options": options}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str:
    """The commit measured; ``+dirty`` when the package itself has uncommitted changes."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+dirty" if _git("status", "--porcelain", "--", "asyncckpt", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def scratch_directory(parent: str | None) -> Iterator[Path]:
    """A directory for checkpoints that is gone afterwards, whatever happens.

    Args:
        parent: where to put it; a real disk, since on tmpfs every durability cost vanishes. None takes
            the directory the benchmark was started in.
    """
    path = Path(tempfile.mkdtemp(prefix="asyncckpt-benchmark-", dir=parent or os.getcwd()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def seconds_of(act: Callable[[], object]) -> float:
    """How long *act* takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def stored_bytes(path: Path) -> int:
    """Sum of the sizes of all files below *path*."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write_results(name: str, results: Mapping[str, Any], path: str | None = None) -> Path:
    """Write *results* as ``benchmarks/results/<name>.json``, or to *path*."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(plain(results), indent=1, allow_nan=False) + "\n")
    return target


def plain(value: Any) -> Any:
    """*value* as strict JSON knows it: NaN, which means "there is no such number", becomes null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print *rows* under *header*, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))
