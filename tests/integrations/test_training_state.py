"""A run that is resumed in a new process from one `TrainingState` goes on bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import asyncckpt as ac
from tests.integrations.test_resume_exact import flatten, require_same

# Trains `first..last`, printing the exact loss of each step; saves after the last one.
TRAINER = """
import json, random, sys
import numpy as np, torch
from torch import nn
import asyncckpt as ac

root, kind, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.use_deterministic_algorithms(True)
torch.manual_seed(first)  # a resumed run starts from other numbers, which the restore must replace
random.seed(first); np.random.seed(first)

class Loader:
    def __init__(self):
        self.position = 0
    def __next__(self):
        self.position += 1
        generator = torch.Generator().manual_seed(self.position)
        return torch.randn(8, 16, generator=generator)
    def state_dict(self):
        return {"position": self.position}
    def load_state_dict(self, state):
        self.position = state["position"]

model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **{kind: True})
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
loader = Loader()
state = ac.TrainingState(
    model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, loader=loader, ema=ema, extra={"seen": 0}
)
with ac.Checkpointer(root, state, writer=ac.Writer(kind="thread"), metadata=ac.run_metadata({"kind": kind})) as ckpt:
    found = ckpt.restore()
    for step in range(first, last):
        batch = next(loader)
        noise = random.random() + float(np.random.rand())
        loss = (model(batch) * noise).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer); scaler.update(); scheduler.step(); optimizer.zero_grad()
        ema.update_parameters(model)
        state["seen"] += len(batch)
        numbers = loss.item().hex(), scheduler.get_last_lr()[0].hex(), scaler.get_scale(), state["seen"]
        print(json.dumps([step, *numbers]))
    ckpt.save(last - 1)
"""


def train(root: Path, kind: str, first: int, last: int) -> list[Any]:
    command = [sys.executable, "-W", "error", "-c", TRAINER, str(root), kind, str(first), str(last)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    expected = train(calm, kind, 0, 10)
    assert train(cut, kind, 0, 5) + train(cut, kind, 5, 10) == expected
    ours, theirs = flatten(ac.load(calm)), flatten(ac.load(cut))
    require_same(ours, theirs)
    assert {key.split("/")[1] for key in ours} == {
        *("model", "optimizer", "scheduler", "scaler", "loader", "ema", "rng", "seen")
    }
    info = ac.open(cut).latest
    assert info is not None
    assert info.metadata["config"] == {"kind": kind}


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_what_is_none_is_left_out_and_containers_are_allowed() -> None:
    (a, one), (b, two) = parts(), parts()
    state = ac.TrainingState(model={"a": a, "b": b}, optimizer=[one, two], rng=False)
    assert dict(state) == {"model": {"a": a, "b": b}, "optimizer": [one, two]}
    rng = ac.RNG()
    assert ac.TrainingState(rng=rng)["rng"] is rng
    assert repr(ac.TrainingState(model=a, extra={"epoch": 3})) == "TrainingState(model, rng, epoch)"


def test_several_models_and_plain_values_are_restored_in_place(tmp_path: Path) -> None:
    (a, one), (b, two) = parts(), parts()
    state = ac.TrainingState(model={"a": a, "b": b}, optimizer={"a": one, "b": two}, extra={"epoch": 3})
    before = [parameter.clone() for model in (a, b) for parameter in model.parameters()]
    with ac.Checkpointer(tmp_path, state, writer=ac.Writer(kind="thread")) as ckpt:
        ckpt.save(1).result(60)
        state["epoch"] = 9
        with torch.no_grad():
            for model in (a, b):
                for parameter in model.parameters():
                    parameter.zero_()
        ckpt.restore()
    assert state["epoch"] == 3
    after = [parameter for model in (a, b) for parameter in model.parameters()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("nested", [False, True])
def test_a_loader_without_a_position_is_refused_with_what_to_use(nested: bool) -> None:
    loader: Any = DataLoader([1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(ac.InvalidOptionError, match=r"^loader.*StatefulDataLoader"):
        ac.TrainingState(loader={"train": loader} if nested else loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Linear}, "model is a builtins.type without state_dict"),
        ({"optimizer": {"a": 3}}, "optimizer/a is a builtins.int"),
        ({"scheduler": []}, "scheduler is a builtins.list"),
        ({"extra": {"model": 1}}, "extra has 'model'"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ac.InvalidOptionError, match=message):
        ac.TrainingState(**arguments)
