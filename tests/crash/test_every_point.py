"""A writer that is killed, or refused, at every durable system call of a save.

The campaign is a program of its own (``points/``), so that two can run side by side. It injects each
fault with strace into a real writer of a real checkpointer, and checks after each: no durable step
lost, none torn, the outcome on the future, the space given back, the next save works.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="strace is a Linux program"),
    pytest.mark.timeout(3 * 3600),  # of the full campaign; the sample has a limit of its own
]

PROGRAM = Path(__file__).parent / "points"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "every_point.json"
SAMPLE = 120
SAMPLE_TIMEOUT_S = 300
NUM_SHARES, NUM_SHARES_FULL = 2, 4  # it waits more than it computes
SKIPPED = 77
FAULTS = [
    "killed",
    *(f"{name} {how}" for name in ("EIO", "ENOSPC", "EROFS") for how in ("once", "for good")),
    "EDQUOT for good",
]
CALLS = {"openat", "mkdir", "write", "pwrite64", "fsync", "rename", "unlink", "rmdir"}
"""What every save calls; syncfs besides, on file systems where that is safe."""


@dataclass(frozen=True)
class Campaign:
    """Results of all shares: the points of a save, outcomes by call and fault, and broken promises."""

    points: list[dict[str, Any]]
    outcomes: dict[str, dict[str, Counter[str]]]
    failures: list[str]

    def num_points(self, key: str) -> Counter[str]:
        return Counter(point[key] for point in self.points)


@pytest.fixture(scope="module")
def campaign(full: bool, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    directory = tmp_path_factory.mktemp("points")
    outputs = [directory / f"share-{share}.json" for share in range(NUM_SHARES_FULL if full else NUM_SHARES)]
    processes = [start(output, f"{share}/{len(outputs)}", full) for share, output in enumerate(outputs)]
    try:
        for process in processes:
            process.wait(timeout=None if full else SAMPLE_TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        said = output.with_suffix(".log").read_text()
        if process.returncode == SKIPPED:
            pytest.skip(said.strip())
        assert process.returncode == 0, said[-5000:]
    results = merge([json.loads(output.read_text()) for output in outputs])
    if full:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(summary(results, directory), indent=1) + "\n")
    return results


def start(output: Path, share: str, full: bool) -> subprocess.Popen[bytes]:
    # Its messages go to a file: a writer that waits for somebody to read them from a pipe does not save.
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                f"--sample={1 if full else SAMPLE}",
                f"--share={share}",
                f"--directory={output.parent}",
                f"--output={output}",
            ],
            stderr=log,
        )


def merge(shares: list[dict[str, Any]]) -> Campaign:
    outcomes: dict[str, dict[str, Counter[str]]] = {}
    for share in shares:
        for call, by_fault in share["outcomes"].items():
            for fault, counts in by_fault.items():
                outcomes.setdefault(call, {}).setdefault(fault, Counter()).update(counts)
    return Campaign(shares[0]["points"], outcomes, [failure for share in shares for failure in share["failures"]])


def summary(results: Campaign, directory: Path) -> dict[str, Any]:
    """What is kept of a full campaign."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": file_system(directory),
        "num_points": len(results.points),
        "num_points_by_scenario": results.num_points("scenario"),
        "num_points_by_call": results.num_points("call"),
        "num_strikes": sum(counts.total() for by_fault in results.outcomes.values() for counts in by_fault.values()),
        "num_failures": len(results.failures),
        "failures": results.failures,
        "outcomes": {call: dict(sorted(by_fault.items())) for call, by_fault in sorted(results.outcomes.items())},
    }


def file_system(directory: Path) -> str:
    command = ["findmnt", "-n", "-o", "FSTYPE", "-T", directory]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_at_any_point_breaks_a_promise(campaign: Campaign, fault: str) -> None:
    assert [failure for failure in campaign.failures if failure.startswith(f"{fault} at ")] == []
    struck = {call for call, by_fault in campaign.outcomes.items() if by_fault.get(fault)}
    assert struck >= CALLS


def test_a_killed_writer_costs_no_save(campaign: Campaign) -> None:
    outcomes = sum((by_fault["killed"] for by_fault in campaign.outcomes.values()), Counter[str]())
    assert outcomes.keys() == {"durable"}


def test_a_transient_error_costs_no_save(campaign: Campaign) -> None:
    outcomes = sum((by_fault["EIO once"] for by_fault in campaign.outcomes.values()), Counter[str]())
    assert outcomes.keys() == {"durable"}


def test_the_points_are_many_and_of_every_kind(campaign: Campaign) -> None:
    assert len(campaign.points) >= 200
    assert campaign.num_points("call").keys() >= CALLS
    assert set(campaign.num_points("scenario")) == {"fresh", "retention"}
