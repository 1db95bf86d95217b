"""Snapshots are the state at ``save()``, bit for bit, in every mode and while training goes on as fast as it can."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.options import SnapshotMode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIMEOUT_S = 100
MODES = get_args(SnapshotMode)
every_mode = pytest.mark.parametrize("mode", MODES)


def staging(mode: str, **options: Any) -> ac.Staging:
    return ac.Staging(snapshot=mode, **options)  # type: ignore[arg-type]


def make(seed: int = 0, width: int = 64, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, width), nn.BatchNorm1d(width), nn.Linear(width, 32)).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(16, 32, device="cuda")).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


Tensors = dict[str, torch.Tensor]


def copies(**objects: Any) -> Tensors:
    """Every tensor of state dicts by path, copied behind what is queued on this stream."""
    return {
        path: tensor.clone() for name, part in objects.items() for path, tensor in tensors_in(part.state_dict(), name)
    }


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_in(part, f"{path}/{key}")


def assert_loaded(root: Path, step: int, expected: Tensors) -> None:
    found = {path.removeprefix("/"): tensor for path, tensor in tensors_in(ac.load(root, step))}
    for path, tensor in expected.items():
        assert torch.equal(found[path], tensor.cpu()), (step, path)


@pytest.mark.timeout(600)
@every_mode
def test_a_thousand_saves_under_a_loop_that_never_waits(tmp_path: Path, mode: str, full: bool) -> None:
    model, optimizer = make()
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    num_saves = 1000 if full else 1000 // len(MODES)
    with ac.Checkpointer(tmp_path, state, staging=staging(mode, slots=2), keep=ac.Keep(last=2)) as ckpt:
        waiting: list[tuple[ac.SaveFuture, Tensors]] = []
        for step in range(num_saves):
            expected = copies(model=model, optimizer=optimizer)
            waiting.append((ckpt.save(step), expected))
            for _ in range(3):
                train(model, optimizer)
            if len(waiting) == 2:
                saving, expected = waiting.pop(0)
                saving.result(TIMEOUT_S)
                assert_loaded(tmp_path, saving.step, expected)
        for saving, _ in waiting:
            saving.result(TIMEOUT_S)


@every_mode
def test_a_large_state_changes_right_after_the_save(tmp_path: Path, mode: str) -> None:
    model = nn.Linear(4096, 4096, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with ac.Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, staging=staging(mode)) as ckpt:
        for step in range(5):
            torch.cuda._sleep(20_000_000)  # the update before is still queued when the state is saved
            optimizer.step()
            expected = copies(model=model)
            saving = ckpt.save(step)
            for _ in range(5):
                optimizer.step()
            saving.result(TIMEOUT_S)
            assert_loaded(tmp_path, step, expected)


@every_mode
def test_several_optimizers_and_what_belongs_to_none(tmp_path: Path, mode: str) -> None:
    model, _ = make(width=512)
    parameters = list(model.parameters())
    optimizers = {
        "sgd": torch.optim.SGD(parameters[:2], lr=0.1, momentum=0.9),
        "fused": torch.optim.AdamW(parameters[2:4], fused=True),
        "capturable": torch.optim.AdamW(parameters[4:], capturable=True),
    }
    average = torch.zeros(1_000_000, device="cuda")
    train(model, *optimizers.values())
    state = {"model": model, **optimizers, "average": average}
    with ac.Checkpointer(tmp_path, state, staging=staging(mode)) as ckpt:
        for step in range(10):
            expected = copies(model=model, **optimizers)
            saving = ckpt.save(step)
            average.add_(1.0)  # owned by no optimizer: the caller's stream waits for its copy
            for _ in range(3):
                train(model, *optimizers.values())
            saving.result(TIMEOUT_S)
            assert_loaded(tmp_path, step, expected)
            assert torch.equal(ac.load(tmp_path, step)["average"], torch.full((1_000_000,), float(step)))


@every_mode
def test_training_on_a_side_stream(tmp_path: Path, mode: str) -> None:
    model, optimizer = make(width=512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    state = {"model": model, "optimizer": optimizer}
    with ac.Checkpointer(tmp_path, state, staging=staging(mode)) as ckpt, torch.cuda.stream(stream):
        for step in range(10):
            train(model, optimizer)
            expected = copies(model=model, optimizer=optimizer)
            saving = ckpt.save(step)
            train(model, optimizer)
            saving.result(TIMEOUT_S)
            assert_loaded(tmp_path, step, expected)


@every_mode
@pytest.mark.parametrize("waits", [True, False])
def test_training_by_graph_replay(tmp_path: Path, mode: str, waits: bool) -> None:
    model, optimizer = make(capturable=True)
    data = torch.randn(16, 32, device="cuda")
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(data).square().mean().backward()
        optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with ac.Checkpointer(tmp_path, state, staging=staging(mode), keep=ac.Keep(last=None)) as ckpt:
        for step in range(10):
            graph.replay()
            expected = copies(model=model, optimizer=optimizer)
            saving = ckpt.save(step)
            if waits:
                saving.wait_staged(TIMEOUT_S)
            graph.replay()
            saving.result(TIMEOUT_S)
            assert_loaded(tmp_path, step, expected)
        # Restoring keeps the tensors whose addresses the graph has.
        ckpt.restore(5)
        graph.replay()
        first = copies(model=model, optimizer=optimizer)
        ckpt.restore(5)
        graph.replay()
        for path, tensor in copies(model=model, optimizer=optimizer).items():
            assert torch.equal(first[path], tensor), path


@pytest.mark.skipif("overlap" not in MODES, reason="this version has no overlapping snapshots")
def test_a_change_behind_the_optimizers_back_fails_the_save(tmp_path: Path) -> None:
    model = nn.Linear(2048, 2048, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with ac.Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, staging=staging("overlap")) as ckpt:
        ckpt.save(0).result(TIMEOUT_S)
        optimizer.step()  # seen since the last save, it is trusted with its parameters
        torch.cuda._sleep(500_000_000)  # the copies cannot have begun
        saving = ckpt.save(1)
        with torch.no_grad():
            model.weight.add_(1.0)
        with pytest.raises(ac.SnapshotMutatedError, match="weight"):
            saving.result(TIMEOUT_S)
        torch.cuda.synchronize()
        ckpt.save(2).result(TIMEOUT_S)
    assert [info.step for info in ac.open(tmp_path).checkpoints()] == [0, 2]


@every_mode
def test_an_optimizer_not_seen_stepping_makes_training_wait_at_once(tmp_path: Path, mode: str) -> None:
    model = nn.Linear(4096, 4096, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = {"model": model, "optimizer": optimizer}
    with ac.Checkpointer(tmp_path, state, staging=staging(mode)) as ckpt, torch.no_grad():
        for step in range(5):
            expected = copies(model=model)
            saving = ckpt.save(step)
            for parameter in model.parameters():
                parameter.data.add_(1.0)  # neither hook nor version tells
            saving.result(TIMEOUT_S)
            assert_loaded(tmp_path, step, expected)


def test_saving_while_a_graph_is_captured_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(1000, device="cuda")
    with ac.Checkpointer(tmp_path, {"weight": weight}) as ckpt:
        ckpt.save(0).result(TIMEOUT_S)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weight.add_(1.0)
            with pytest.raises(ac.GraphCaptureError):
                ckpt.save(1)
        graph.replay()
        ckpt.save(1).result(TIMEOUT_S)
    assert torch.equal(ac.load(tmp_path, 1)["weight"], torch.ones(1000))


@contextmanager
def memory_left(num_bytes: int) -> Iterator[None]:
    """Let this process have so much more device memory only."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + num_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@every_mode
def test_a_full_device_costs_speed_but_no_checkpoint(tmp_path: Path, mode: str) -> None:
    model = nn.Linear(8192, 8192, device="cuda")  # 268 MB, of which no copy fits
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = {f"model/{name}": tensor.cpu() for name, tensor in model.state_dict().items()}
    state = {"model": model, "optimizer": optimizer}
    with (
        ac.Checkpointer(tmp_path, state, staging=staging(mode)) as ckpt,
        memory_left(32 * 2**20),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")  # one may say that the mode was not possible
        saving = ckpt.save(1)
        optimizer.step()
        saving.result(TIMEOUT_S)
    assert_loaded(tmp_path, 1, expected)
