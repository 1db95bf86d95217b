"""Restores into tensors on a device: exact, in place, ordered with the caller's stream, all of it or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt as ac
from asyncckpt.state import loader
from asyncckpt.state.upload import Uploader
from tests.gpu.test_cuda_snapshots import tensors_in

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIMEOUT_S = 100


def save(root: Path, state: dict[str, Any], step: int = 1) -> None:
    with ac.Checkpointer(root, state) as ckpt:
        ckpt.save(step).result(TIMEOUT_S)


def restore(root: Path, state: dict[str, Any]) -> None:
    with ac.Checkpointer(root, state) as ckpt:
        assert ckpt.restore() is not None


@pytest.fixture(params=[64 * 2**20, 4096], ids=["ring of 64 MiB", "ring of 4 KiB"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of usual size, and such that every tensor is cut."""
    monkeypatch.setattr(loader, "Uploader", lambda: Uploader(buffer_bytes=request.param))


LAYOUTS: dict[str, Any] = {
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 3),
    "contiguous": lambda: torch.randn(501, 77),
    "large": lambda: torch.randn(40_000_001),  # more than the ring holds at a time
    "transposed": lambda: torch.randn(333, 65).t(),
    "every other": lambda: torch.randn(300, 40)[:, ::2],
    "channels last": lambda: torch.randn(8, 3, 17, 5).to(memory_format=torch.channels_last),
    "bfloat16": lambda: torch.randn(5001).to(torch.bfloat16),
    "float8": lambda: torch.randn(5001).to(torch.float8_e4m3fn),
    "bool": lambda: torch.rand(5001) > 0.5,
    "int64": lambda: torch.arange(5001),
    "complex": lambda: torch.randn(501, dtype=torch.complex64),
}


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the same strides on the device."""
    base = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype, device="cuda")
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.usefixtures("ring")
def test_tensors_of_every_layout_and_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = {name: make() for name, make in LAYOUTS.items()}
    save(tmp_path, source)
    live = {name: like(tensor) for name, tensor in source.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
    restore(tmp_path, live)
    for name, tensor in source.items():
        assert live[name].data_ptr() == addresses[name]
        assert live[name].stride() == tensor.stride()
        found = live[name].cpu().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found, tensor.contiguous().reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("has_moments", [True, False], ids=["live moments", "fresh optimizer"])
@pytest.mark.usefixtures("ring")
def test_optimizers_continue_as_if_nothing_had_happened(
    tmp_path: Path, options: dict[str, bool], has_moments: bool
) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 8)).cuda()
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01, **options)}

    def train(state: dict[str, Any], steps: int) -> None:
        torch.manual_seed(7)
        for _ in range(steps):
            state["model"](torch.randn(16, 64, device="cuda")).square().mean().backward()
            state["optimizer"].step()
            state["optimizer"].zero_grad()

    source, live = make(0), make(1)
    train(source, 3)
    if has_moments:
        train(live, 1)
    save(tmp_path, source)
    restore(tmp_path, live)
    moved = [value.device.type for values in live["optimizer"].state.values() for value in values.values()]
    assert moved == [value.device.type for values in source["optimizer"].state.values() for value in values.values()]
    for name in ("model", "optimizer"):
        found = dict(tensors_in(live[name].state_dict()))
        for path, tensor in tensors_in(source[name].state_dict()):
            assert torch.equal(found[path], tensor), path
    train(source, 3)
    train(live, 3)
    for one, other in zip(source["model"].parameters(), live["model"].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # kernels need not be deterministic


def test_moments_wider_than_their_parameters_come_back_exact(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.randn(parameter.shape, device="cuda")
        return {"model": model, "optimizer": optimizer}

    source, live = make(0), make(1)
    live["optimizer"].state.clear()
    save(tmp_path, source)
    restore(tmp_path, live)
    pairs = zip(source["optimizer"].state.values(), live["optimizer"].state.values(), strict=True)
    for one, other in pairs:
        assert other["momentum_buffer"].dtype is torch.float32
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_what_the_caller_queues_before_and_after_is_in_order(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(4_000_000)})
    stream = torch.cuda.Stream()
    live = {"t": torch.zeros(4_000_000, device="cuda")}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        before = live["t"] + 0  # queued: still the zeros
        live["t"].add_(5.0)  # queued: overwritten by the restore
        restore(tmp_path, live)
        after = live["t"] * 2
    stream.synchronize()
    assert before.sum() == 0
    assert torch.equal(after, torch.full_like(after, 2.0))


def test_host_and_device_tensors_and_inference_tensors_in_one_state(tmp_path: Path) -> None:
    save(tmp_path, {"host": torch.ones(1000), "device": torch.ones(1000), "frozen": torch.ones(10, 10)})
    with torch.inference_mode():
        frozen = torch.zeros(10, 10, device="cuda").t()
    live = {"host": torch.zeros(1000), "device": torch.zeros(1000, device="cuda"), "frozen": frozen}
    restore(tmp_path, live)
    assert [float(tensor.sum()) for tensor in live.values()] == [1000, 1000, 100]
    with torch.inference_mode():
        live["device"].zero_()
        restore(tmp_path, live)
    assert live["device"].sum() == 1000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_devices(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3_000_000), "b": torch.full((3_000_000,), 2.0)})
    live = {name: torch.zeros(3_000_000, device=f"cuda:{index}") for index, name in enumerate("ab")}
    restore(tmp_path, live)
    assert [float(tensor.mean()) for tensor in live.values()] == [1.0, 2.0]


def test_without_room_for_the_moments_nothing_changes(tmp_path: Path) -> None:
    def make(value: float) -> dict[str, Any]:
        model = nn.Linear(8192, 4096, bias=False, device="cuda")
        nn.init.constant_(model.weight, value)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    source = make(1.0)
    source["model"].weight.grad = torch.ones_like(source["model"].weight)
    source["optimizer"].step()
    save(tmp_path, source)
    del source
    live = make(5.0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        with ac.Checkpointer(tmp_path, live) as ckpt:
            with pytest.raises(torch.OutOfMemoryError):
                ckpt.restore()
            assert torch.equal(live["model"].weight.cpu(), torch.full((4096, 8192), 5.0))
            assert not live["optimizer"].state
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    restore(tmp_path, live)
    assert live["model"].weight.mean() < 1.1


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3_000_000), "b": torch.ones(3_000_000)})
    (damaged, *_) = sorted((tmp_path / "step-00000001" / "state" / "b").glob("c.*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    live = {name: torch.zeros(3_000_000, device="cuda") for name in "ab"}
    with ac.Checkpointer(tmp_path, live) as ckpt, pytest.raises(ac.CorruptCheckpointError):
        ckpt.restore(1)
    assert [float(tensor.sum()) for tensor in live.values()] == [0.0, 0.0]
