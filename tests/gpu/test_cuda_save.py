"""Saving from and restoring to a real CUDA device; the order of streams and events is tested with a fake elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import asyncckpt as ac

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIMEOUT_S = 100


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(64, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(256, 2048), nn.Dropout(0.1), nn.Linear(2048, 256)).to("cuda")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_the_snapshot_is_the_state_at_save_although_training_goes_on(tmp_path: Path, kind: str) -> None:
    model, optimizer = make()
    state = {"model": model, "optimizer": optimizer, "rng": ac.RNG()}
    with ac.Checkpointer(tmp_path, state, writer=ac.Writer(kind=kind)) as ckpt:  # type: ignore[arg-type]
        train(model, optimizer, 3)
        expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        saving = ckpt.save(3)
        train(model, optimizer, 20)
        saving.result(TIMEOUT_S)
    loaded = ac.load(tmp_path, 3)["model"]
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_resumed_run_draws_the_same_numbers_and_takes_the_same_steps(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        model, optimizer = make()
        with ac.Checkpointer(tmp_path, {"model": model, "optimizer": optimizer, "rng": ac.RNG()}) as ckpt:
            train(model, optimizer, 3)
            ckpt.save(3).result(TIMEOUT_S)
            train(model, optimizer, 5)
        again, its_optimizer = make()
        with ac.Checkpointer(tmp_path, {"model": again, "optimizer": its_optimizer, "rng": ac.RNG()}) as ckpt:
            found = ckpt.restore()
            assert found is not None
            train(again, its_optimizer, 5)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_save_on_a_side_stream_waits_for_what_was_queued_on_it(tmp_path: Path) -> None:
    tensor = torch.zeros(64 * 2**20 // 4, device="cuda")
    stream = torch.cuda.Stream()
    with ac.Checkpointer(tmp_path, {"t": tensor}) as ckpt:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # keeps the stream busy, so that the addition is certainly still queued
            tensor.add_(1.0)
            saving = ckpt.save(1)
        saving.result(TIMEOUT_S)
    assert torch.equal(ac.load(tmp_path, 1)["t"], torch.ones_like(tensor, device="cpu"))


def test_small_large_and_odd_tensors_of_every_type(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(3.5, device="cuda"),
        "empty": torch.empty(0, 3, device="cuda"),
        "transposed": torch.randn(33, 65, device="cuda").t(),
        "bool": torch.rand(1001, device="cuda") > 0.5,
        "bfloat16": torch.randn(5000, device="cuda").to(torch.bfloat16),
        "float16": torch.randn(5000, device="cuda").half(),
        "int64": torch.arange(5000, device="cuda"),
        "large": torch.randn(3_000_001, device="cuda"),
        "host": torch.randn(1000),
    }
    with ac.Checkpointer(tmp_path, state) as ckpt:
        ckpt.save(1).result(TIMEOUT_S)
        target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        ckpt.restore(1, state=target)
    for name, tensor in state.items():
        assert target[name].device == tensor.device
        assert torch.equal(target[name], tensor), name
