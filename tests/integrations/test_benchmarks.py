"""The benchmarks run, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="they measure Linux facilities"),
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of source distributions"),
]


def run(name: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / name), f"--directory={tmp_path}", f"--output={output}", *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing else is left behind"
    return json.loads(output.read_text())


@pytest.mark.parametrize("peer", ["torch.save", "dcp.async_save thread", "torch_checkpointing", "asyncckpt fast"])
def test_lost_time_measures_each_saver(tmp_path: Path, peer: str) -> None:
    results = run("lost_time.py", tmp_path, "--size=tiny", "--repetitions=1", "--alone-steps=5", "--peers", peer)
    (saver,) = results["savers"]
    assert saver["saver"] == peer
    assert saver["stored_bytes"] > 0
    assert saver["peak_bytes"] > results["state_bytes"]
    assert saver["blocked_ms"]["median"] > 0
    assert saver["durable_s"]["median"] > 0


def test_many_tensors_restores_what_it_saved(tmp_path: Path) -> None:
    results = run("many_tensors.py", tmp_path, "--tensors=50", "--repetitions=1")
    assert results["num_tensors"] == 50
    assert results["num_files"] / results["num_tensors"] < 2.2


def test_round_trip_is_bit_for_bit_in_every_preset(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    results = run("roundtrip.py", tmp_path, "--size=tiny")
    assert [preset["preset"] for preset in results["presets"]] == ["fast", "small", "none"]


@pytest.mark.parametrize("saver", ["torch.save", "dcp.save", "torch_checkpointing", "asyncckpt"])
def test_faults_finds_what_each_saver_survives(tmp_path: Path, saver: str) -> None:
    results = run("faults.py", tmp_path, "--kills=1", "--flips=3", "--cuts=0", "--savers", saver)["savers"][saver]
    assert results["kill"]["kills"] == 1
    assert results["kill"]["acknowledged_lost"] == 0
    flip = results["flip"]
    assert flip["detected"] + flip["harmless"] + flip["silently_wrong"] == flip["flips"] == 3
    if saver == "asyncckpt":
        assert results["kill"]["newest_torn"] == flip["silently_wrong"] == 0


def test_adaptive_measures_a_run_of_its_own(tmp_path: Path) -> None:
    results = run("adaptive.py", tmp_path, "--megabytes=8", "--seconds=3", "--shortest=0.2", "--max-overhead=0.5")
    assert len(results["saves"]) >= 2
    assert results["report"]["cost_s"] > 0
    assert all(saved["durable_s"] >= saved["blocked_s"] > 0 for saved in results["saves"])
