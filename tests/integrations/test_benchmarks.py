"""The benchmarks run, at sizes that say nothing about speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="they measure Linux facilities"),
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of source distributions"),
]


# One of each kind. Others, which start processes of their own and take longer, have tests of their own.
SUITE_PEERS = ["torch.save", "dcp.async_save thread", "asyncckpt fast", "asyncckpt none"]


def run(name: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / name), f"--directory={tmp_path}", f"--output={output}", *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing else is left behind"
    return json.loads(output.read_text())


@pytest.mark.timeout(300)
def test_suite_answers_every_question(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "suite.py"), "--size=tiny", "--repetitions=1", "--alone-steps=3"]
    command += [f"--directory={tmp_path}", f"--results={tmp_path / 'results'}", "--peers", *SUITE_PEERS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert "MISSED" in ended.stdout, "a state of 2 MB cannot keep promises about gigabytes"
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "nothing else is left behind"
    assert ended.stdout.count("; 1 repetitions unless stated, ") == 6, "under the tables of each question"
    verdicts = json.loads((tmp_path / "results" / "targets.json").read_text())["targets"]
    assert {verdict["what"] for verdict in verdicts if verdict["value"] is None} == {
        "one tensor of 8 GB: memory beyond one copy, MiB"
    }
    drawn = {path.stem for path in (tmp_path / "results").glob("*.png")}
    assert drawn == ({"lost_time", "durable", "restore", "growth"} if find_spec("matplotlib") else set())
    predicted = json.loads((tmp_path / "results" / "predict.json").read_text())
    assert all(row["predicted_s"] > 0 for row in predicted["checks"])


@pytest.mark.parametrize("peer", ["dcp.async_save process", "torch_checkpointing"])
def test_lost_time_measures_each_saver(tmp_path: Path, peer: str) -> None:
    results = run("lost_time.py", tmp_path, "--size=tiny", "--repetitions=1", "--alone-steps=5", "--peers", peer)
    (saver,) = results["savers"]
    assert saver["saver"] == peer
    assert saver["stored_bytes"] > 0
    assert saver["peak_bytes"] > results["state_bytes"]
    assert saver["blocked_ms"]["median"] > 0
    assert saver["durable_s"]["median"] > 0


@pytest.mark.parametrize("peer", ["dcp.save", "tensorstore", "asyncckpt none"])
def test_many_tensors_restores_what_it_saved(tmp_path: Path, peer: str) -> None:
    results = run("many_tensors.py", tmp_path, "--tensors=50", "--repetitions=1", "--peers", peer)
    (saver,) = results["savers"]
    assert saver["num_tensors"] == 50
    assert saver["restore_s"]["median"] > 0


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


@pytest.mark.parametrize("saver", ["dcp.async_save pinned", "asyncckpt blocking"])
def test_gpu_stall_runs_without_a_gpu_when_told_to(tmp_path: Path, saver: str) -> None:
    results = run(
        "gpu_stall.py", tmp_path, "--size=tiny", "--device=cpu", "--repetitions=1", "--alone-steps=2", "--peers", saver
    )
    (summary,) = results["savers"]
    assert summary["saver"] == saver
    assert summary["durable_s"]["median"] > 0
    assert summary["stale_fraction"] == 0.0
    assert len(results["targets"]) == (4 if saver.startswith("asyncckpt") else 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_stall_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_stall.py"), f"--directory={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "this machine has none" in ended.stderr


def test_the_formula_lies_between_the_slower_of_core_and_disk_and_both_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    predict = importlib.import_module("predict")
    nothing = predict.Line(0.0, 0.0)
    # 4 GB: 4 s of one core, and 3 s of the disk at most.
    constants = predict.Constants(nothing, nothing, nothing, {"fast": 1e9}, 1e9, {"fast": 0.75})

    def durable_s(threads: int, cores: int, num_tensors: int = 100, disk: float = 1e9) -> float:
        machine = predict.Machine(1e15, cores, threads, cores, disk, disk)
        return float(predict.predict(predict.Work(4_000_000_000, num_tensors), machine, constants).durable_s)

    assert durable_s(threads=1, cores=2) == pytest.approx(4 + 3, rel=1e-4)
    assert durable_s(threads=64, cores=2) == pytest.approx(3, rel=1e-2), "the disk never waits"
    assert durable_s(threads=4, cores=2, disk=1e15) == pytest.approx(4 / 2, rel=1e-4)
    assert 3 < durable_s(threads=4, cores=2) < durable_s(threads=2, cores=2) < (4 + 3)


def gpu_result(saver: str, lost_s: float, *, stale: float | None = 0.0) -> dict[str, Any]:
    """What a worker reports of one save: steps of 100 ms, of which three were 110 ms, and a gap of 1.5 ms."""
    save = {
        "blocked_s": 0.004,
        "durable_s": 2.0,
        "lost_s": lost_s,
        "gap_s": 0.0015,
        "other_gaps_s": 0.001,
        "alone_s": [0.1] * 5,
        "during_s": [0.11] * 3,
        "copy_bytes_per_s": 48e9,
    }
    return {
        "saver": saver,
        "saves": [save],
        "first": save,
        "raw_copy_bytes_per_s": 50e9,
        "stale_fraction": stale,
        "peak_device_bytes": 0,
    }


def test_gpu_stall_compares_with_the_best_peer_that_saves_the_right_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_stall = importlib.import_module("gpu_stall")
    ours = [gpu_result("asyncckpt blocking", 0.3), gpu_result("asyncckpt overlap", 0.02)]
    peers = [gpu_result("dcp a", 0.25), gpu_result("dcp b", 0.4), gpu_result("dcp torn", 0.01, stale=0.5)]
    summaries = [gpu_stall.summarise(result) for result in (*ours, *peers, gpu_result("torch.save", 0.001, stale=None))]
    assert summaries[1]["idle_ms"]["median"] == pytest.approx(0.5)
    assert summaries[1]["idle_percent_of_step"] == pytest.approx(0.5)
    assert summaries[1]["slower_percent"] == pytest.approx(10)
    assert summaries[1]["copy_percent_of_raw"] == pytest.approx(96)
    verdicts = {verdict["what"]: verdict for verdict in gpu_stall.judge(summaries)}
    assert {verdict["saver"] for verdict in verdicts.values()} == {"asyncckpt overlap"}
    assert verdicts["training time lost per that of the best peer"]["value"] == pytest.approx(0.08)
    assert all(verdict["met"] for verdict in verdicts.values())
    missed = [gpu_stall.summarise(gpu_result("asyncckpt overlap", 0.03, stale=0.1)), *summaries[2:4]]
    assert [verdict["met"] for verdict in gpu_stall.judge(missed)] == [True, True, True, False, False]


def test_the_optimizer_of_the_gpu_benchmark_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_state = importlib.import_module("gpu_state")
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        gpu_state.MixedAdamW(models[0].parameters(), lr=0.1),
        torch.optim.AdamW(models[1].parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for _ in range(3):
        data = torch.randn(7, 5)
        for model, optimizer in zip(models, optimizers, strict=True):
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert {tensor.dtype for state in optimizers[0].state.values() for tensor in state.values()} == {torch.float32}
