"""``ls``, ``show`` and ``verify`` on real checkpoints: what they print, and how they exit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.cli import main

STEPS = (3, 5, 8)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: ``cli("ls", root)``."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["asyncckpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Result(int(ended.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three steps of a small model with tied weights."""
    root = tmp_path_factory.mktemp("saved") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    state = {"model": model, "scale": torch.ones(2, 3, dtype=torch.bfloat16), "epoch": 7}
    with ac.Checkpointer(root, state, writer=ac.Writer(kind="thread"), metadata={"lr": 0.1}) as ckpt:
        for step in STEPS:
            loss = float("nan") if step == 5 else 1 / step
            ckpt.save(step, metrics={"loss": loss}, tags=["good"] if step == 3 else []).result(60)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def step_dir(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def data_file(root: Path, step: int) -> Path:
    """The largest file of a step: a chunk of the weight."""
    return max(step_dir(root, step).rglob("c.*"), key=lambda path: path.stat().st_size)


# ------------------------------------------------------------------------------------------------ ls


def test_ls_lists_steps_newest_first(cli: Cli, root: Path) -> None:
    result = cli("ls", root)
    assert result.code == 0
    title, *rows = result.out.splitlines()
    assert title.split() == ["step", "kind", "created", "raw", "stored", "ratio", "arrays", "finite", "metrics", "tags"]
    assert [row.split()[0] for row in rows] == ["8", "5", "3"]
    assert "loss=nan" in rows[1]
    assert rows[2].endswith("good")


def test_ls_json_holds_what_the_checkpoints_say(cli: Cli, root: Path) -> None:
    document = cli("ls", root, "--json").json
    expected = [(info.step, info.path, info.raw_bytes, info.stored_bytes) for info in ac.open(root).checkpoints()]
    listed = [(one["step"], one["path"], one["raw_bytes"], one["stored_bytes"]) for one in document["steps"]]
    assert listed == expected[::-1]
    assert document["steps"][1]["metrics"] == {"loss": "nan"}
    assert document["steps"][2]["tags"] == ["good"]
    assert document["damaged"] == []


def test_ls_marks_damaged_steps(cli: Cli, root: Path) -> None:
    flip_byte(step_dir(root, 5) / "zarr.json")
    result = cli("ls", root)
    assert result.code == 0
    rows = result.out.splitlines()[1:]
    assert ["DAMAGED" in row for row in rows] == [False, True, False]
    assert "step 5 is damaged" in result.err
    assert [one["step"] for one in cli("ls", root, "--json").json["damaged"]] == [5]


def test_ls_of_damaged_steps_only_is_corrupt(cli: Cli, root: Path) -> None:
    for step in STEPS:
        flip_byte(step_dir(root, step) / "zarr.json")
    assert cli("ls", root).code == 3


@pytest.mark.parametrize("verb", ["ls", "show", "verify"])
def test_nothing_committed_has_its_own_exit_code(cli: Cli, tmp_path: Path, verb: str) -> None:
    result = cli(verb, tmp_path, "--json")
    assert result.code == 4
    assert "nothing is committed" in result.err
    assert result.json["error"]["code"] == "nothing_committed"


@pytest.mark.parametrize("verb", ["ls", "show", "verify"])
def test_a_missing_directory_is_named_and_not_created(cli: Cli, tmp_path: Path, verb: str) -> None:
    missing = tmp_path / "missing"
    result = cli(verb, missing)
    assert result.code == 4
    assert str(missing) in result.err
    assert not missing.exists()


@pytest.mark.parametrize("verb", ["ls", "show", "verify"])
def test_looking_changes_nothing(cli: Cli, root: Path, verb: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert cli(verb, root).code == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    "arguments", [[], ["ls"], ["frobnicate"], ["show", "x", "--step"], ["verify", "x", "--threads", 0]]
)
def test_wrong_usage_exits_with_2(cli: Cli, arguments: list[object]) -> None:
    assert cli(*arguments).code == 2


def test_a_scheme_that_is_not_there_is_wrong_usage(cli: Cli) -> None:
    assert cli("ls", "s3://bucket/run").code == 2


# ---------------------------------------------------------------------------------------------- show


def test_show_prints_the_newest_step_and_its_tensors(cli: Cli, root: Path) -> None:
    result = cli("show", root)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "step 8"
    assert any(line.startswith("  metadata") and "lr=0.1" in line for line in lines)
    weight = next(line.split() for line in lines if line.startswith("model/0.weight"))
    assert weight == ["model/0.weight", "float32", "[64,", "64]", "16.4", "kB"]
    scale = next(line for line in lines if line.startswith("scale "))
    assert "bfloat16" in scale
    assert scale.endswith("in the header")
    assert next(line for line in lines if line.startswith("model/1.weight")).endswith("tied to model/0.weight")


def test_show_counts_tied_tensors_once(cli: Cli, root: Path) -> None:
    assert "model: 3 tensors, 16.6 kB" in cli("show", root).out  # 64 * 64 * 4 + 64 * 4


@pytest.mark.parametrize("which", ["3", "good"])
def test_show_finds_steps_by_number_and_tag(cli: Cli, root: Path, which: str) -> None:
    document = cli("show", root, "--step", which, "--json").json
    assert document["step"] == 3
    assert document["metadata"] == {"lr": 0.1}
    assert {one["path"]: one["shape"] for one in document["tensors"]} == {
        "model/0.weight": [64, 64],
        "model/0.bias": [64],
        "model/1.weight": [64, 64],
        "scale": [2, 3],
    }


def test_show_only_filters_tensors(cli: Cli, root: Path) -> None:
    document = cli("show", root, "--only", "model/0.*", "--only", "scale", "--json").json
    assert {one["path"] for one in document["tensors"]} == {"model/0.weight", "model/0.bias", "scale"}


def test_show_of_a_step_that_is_not_there_is_wrong_usage(cli: Cli, root: Path) -> None:
    result = cli("show", root, "--step", 4)
    assert result.code == 2
    assert "step 4" in result.err


def test_show_of_a_damaged_step_is_corrupt(cli: Cli, root: Path) -> None:
    flip_byte(step_dir(root, 8) / "zarr.json")
    result = cli("show", root, "--step", 8, "--json")
    assert result.code == 3
    assert result.json["error"]["code"] == "corrupt_checkpoint"
    assert cli("show", root, "--json").json["step"] == 5


def test_show_of_damaged_steps_only_is_corrupt(cli: Cli, root: Path) -> None:
    for step in STEPS:
        flip_byte(step_dir(root, step) / "zarr.json")
    assert cli("show", root).code == 3


# -------------------------------------------------------------------------------------------- verify


def test_verify_reads_the_newest_step(cli: Cli, root: Path) -> None:
    result = cli("verify", root)
    assert result.code == 0
    assert result.out.startswith("step 8: ok; ")


def test_verify_all_reads_every_step(cli: Cli, root: Path) -> None:
    document = cli("verify", root, "--all", "--json").json
    assert document["ok"] is True
    assert [one["step"] for one in document["steps"]] == [8, 5, 3]
    assert all(one["num_files"] > 3 and one["checked_bytes"] > 0 for one in document["steps"])


def test_verify_names_each_damaged_file(cli: Cli, root: Path) -> None:
    damaged = data_file(root, 5)
    flip_byte(damaged)
    (step_dir(root, 5) / "stray").write_bytes(b"")
    key = damaged.relative_to(step_dir(root, 5)).as_posix()
    result = cli("verify", root, "--step", 5)
    assert result.code == 3
    assert result.out.startswith("step 5: DAMAGED, 2 bad; ")
    assert f"  {key}: " in result.out
    assert "  stray: unexpected file" in result.out
    assert cli("verify", root).code == 0
    assert cli("verify", root, "--all").code == 3
    document = cli("verify", root, "--step", 5, "--json").json
    assert [one["key"] for one in document["steps"][0]["damaged"]] == sorted([key, "stray"])


def test_verify_reports_a_damaged_header_of_the_newest_step(cli: Cli, root: Path) -> None:
    flip_byte(step_dir(root, 8) / "zarr.json")
    result = cli("verify", root)
    assert result.code == 3
    assert result.out.startswith("step 8: DAMAGED")


def test_verify_of_a_step_that_is_not_there_is_wrong_usage(cli: Cli, root: Path) -> None:
    assert cli("verify", root, "--step", 4).code == 2
    assert cli("verify", root, "--step", "unheard-of").code == 2


def test_verify_deep_decodes(cli: Cli, root: Path) -> None:
    result = cli("verify", root, "--deep")
    assert result.code == 0
    assert "read and decoded" in result.out
    assert cli("verify", root, "--deep", "--json").json["steps"][0]["deep"] is True
    assert cli("verify", root, "--json").json["steps"][0]["deep"] is False


def test_verify_reads_a_sample(cli: Cli, root: Path) -> None:
    result = cli("verify", root, "--sample", "5%", "--seed", 5)
    assert result.code == 0
    assert "a sample of 0.05 of the bytes (seed 5)" in result.out
    (step,) = cli("verify", root, "--sample", "0.05", "--seed", 5, "--json").json["steps"]
    (whole,) = cli("verify", root, "--json").json["steps"]
    assert (step["sample"], step["seed"]) == (0.05, 5)
    assert 0 < step["checked_bytes"] < whole["checked_bytes"]


@pytest.mark.parametrize("sample", ["0%", "101%", "some", "nan", ""])
def test_a_sample_that_is_no_fraction_is_wrong_usage(cli: Cli, root: Path, sample: str) -> None:
    assert cli("verify", root, "--sample", sample).code == 2


def test_verify_names_damaged_tensors(cli: Cli, root: Path) -> None:
    flip_byte(data_file(root, 8))
    assert "[model/0.weight, model/1.weight]" in cli("verify", root).out
    (damage,) = cli("verify", root, "--json").json["steps"][0]["damaged"]
    assert damage["array"] == "state/model/0.weight"
    assert damage["tensors"] == ["model/0.weight", "model/1.weight"]


def test_names_in_a_checkpoint_do_not_drive_the_terminal(cli: Cli, root: Path) -> None:
    (step_dir(root, 8) / "\x1b]0;owned\x07\udcff").write_bytes(b"")
    result = cli("verify", root)
    assert result.code == 3
    assert "\x1b" not in result.out
    assert "  \\x1b]0;owned\\x07\\udcff: unexpected file" in result.out


def test_verify_needs_no_codec_unless_it_decodes(root: Path) -> None:
    script = f"""
import contextlib, sys
from asyncckpt.cli import main
for arguments in (["verify", {str(root)!r}], ["verify", {str(root)!r}, "--deep"]):
    sys.argv = ["asyncckpt", *arguments]
    with contextlib.suppress(SystemExit):
        main()
    print(sorted({{"torch", "zarr", "numcodecs"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1::2] == ["[]", "['numcodecs']"], done.stderr


def test_verify_shows_progress_on_a_terminal(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncckpt.cli.verify.is_terminal", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = cli("verify", root, "--all")
    assert result.code == 0
    assert len([line for line in result.out.splitlines() if ": ok; " in line]) == 3


# --------------------------------------------------------------------------------------- the program


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"asyncckpt {ac.__version__}\n"


def test_a_missing_extra_is_explained(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncckpt.cli.find_spec", lambda name: None if name == "typer" else object())
    result = cli("ls", ".")
    assert result.code == 1
    assert "typer is not installed" in result.err
    assert "pip install 'asyncckpt[cli]'" in result.err
