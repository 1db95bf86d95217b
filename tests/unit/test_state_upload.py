"""Uploads to devices: every byte arrives through a small ring, and in the right order of CUDA calls.

The fake runtime records calls; its "devices" are host memory, so that contents can be compared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from state_helpers import fingerprint, restore, save
from torch import nn, optim

from asyncckpt.state import loader as loader_module
from asyncckpt.state import upload as upload_module
from asyncckpt.state.upload import Uploader
from asyncckpt.tensors import cut_alike


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self._log = log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._stream = ""

    def record(self, stream: FakeStream) -> None:
        self._stream = stream.name
        self._log.append(f"record {stream.name}")

    def synchronize(self) -> None:
        assert self._stream, "an event that was never recorded waits for nothing"
        self._log.append(f"wait event of {self._stream}")


class FakeRuntime:
    """The part of ``torch.cuda`` the uploader uses."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(f"side {device}", self.log)

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(f"caller {device}", self.log)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield

    def Event(self) -> FakeEvent:
        return FakeEvent(self.log)


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory is neither pinned nor streamed."""
    monkeypatch.setattr(upload_module, "_record_use", lambda target, stream: stream._log.append(f"use {stream.name}"))
    monkeypatch.setattr(upload_module, "_pinned", lambda num_bytes: torch.full((num_bytes,), 0xA5, dtype=torch.uint8))


def upload(copies: list[tuple[torch.Tensor, torch.Tensor]], buffer_bytes: int = 256, num_buffers: int = 3) -> list[str]:
    runtime = FakeRuntime()
    uploader = Uploader(runtime, buffer_bytes, num_buffers)
    uploader.reserve(copies)
    with torch.no_grad():
        uploader.upload(copies)
    return runtime.log


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    return (torch.randn(shape) * 100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("buffer_bytes", [64, 250, 4096])
def test_tensors_of_all_sizes_and_layouts_arrive_bit_for_bit(dtype: torch.dtype, buffer_bytes: int) -> None:
    torch.manual_seed(0)
    contiguous = [(), (0,), (3, 0, 2), (1,), (7,), (1000,), (1, 301), (17, 19), (1, 1, 500)]
    targets = [torch.zeros(shape, dtype=dtype) for shape in contiguous]
    base = torch.zeros(40, 60, dtype=dtype)
    strided = [
        base[:20, ::3],
        base[20:].t(),
        torch.zeros(2, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last),
    ]
    targets += [*strided, torch.zeros(1, 500, 1, dtype=dtype).transpose(0, 1)]
    sources = [values(tuple(target.shape), dtype) for target in targets]
    sources[-2] = sources[-2].transpose(0, 1).contiguous().transpose(0, 1)  # sources may be views as well
    upload(list(zip(targets, sources, strict=True)), buffer_bytes)
    for target, source in zip(targets, sources, strict=True):
        assert same_bits(target, source), (target.shape, target.stride())


def test_nothing_beside_a_strided_target_is_written() -> None:
    base = torch.zeros(10, 10)
    upload([(base[:, ::2], torch.ones(10, 5))], 64)
    assert torch.equal(base[:, 1::2], torch.zeros(10, 5))
    assert base.sum() == 50


def test_parameters_and_inference_tensors_take_new_values_in_place() -> None:
    parameter = nn.Parameter(torch.zeros(100))
    with torch.inference_mode():
        frozen = torch.zeros(10, 10).t()
    address, version = parameter.data_ptr(), parameter._version
    upload([(parameter, torch.ones(100)), (frozen, torch.ones(10, 10))], 64)
    assert parameter.data_ptr() == address
    assert parameter._version > version  # autograd must know
    assert frozen.is_inference()
    assert parameter.sum() == frozen.sum() == 100


def test_an_upload_follows_the_caller_and_the_caller_follows_it() -> None:
    log = upload([(torch.zeros(4), torch.ones(4)), (torch.zeros(2), torch.ones(2))])
    assert log == [
        "side cpu waits for caller cpu",
        "use side cpu",
        "enter side cpu",
        "use side cpu",
        "enter side cpu",
        "caller cpu waits for side cpu",
        "enter side cpu",
        "record side cpu",
        "wait event of side cpu",
    ]


def test_a_buffer_is_not_filled_again_before_the_device_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    place = upload_module._Buffer.place

    def recorded(buffer: Any, like: torch.Tensor) -> torch.Tensor:
        number = next(number for number, one in enumerate(uploader._ring) if one is buffer)
        runtime.log.append(f"fill {number}")
        return place(buffer, like)

    monkeypatch.setattr(upload_module._Buffer, "place", recorded)
    uploader = Uploader(runtime, 64, 2)
    copies = [(torch.zeros(64), torch.arange(64.0))]
    uploader.reserve(copies)
    uploader.upload(copies)
    order = [entry for entry in runtime.log if entry.startswith(("fill", "record", "wait event"))]
    # The copies out of a buffer are behind its event when it is waited for, and only then it is filled again.
    assert order == [
        *("fill 0", "record side cpu", "fill 1", "record side cpu"),
        *("wait event of side cpu", "fill 0", "record side cpu", "wait event of side cpu", "fill 1"),
        *("wait event of side cpu", "record side cpu", "wait event of side cpu"),
    ]


def test_devices_have_streams_of_their_own_and_share_the_ring() -> None:
    class Remote(torch.Tensor):
        """Host memory that says it is on another device."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 1)

    far = torch.zeros(4).as_subclass(Remote)
    runtime = FakeRuntime()
    uploader = Uploader(runtime, 256, 2)
    copies = [(torch.zeros(4), torch.ones(4)), (far, torch.ones(4))]
    uploader.reserve(copies)
    uploader.upload(copies)
    assert "side cuda:1 waits for caller cuda:1" in runtime.log
    assert "caller cuda:1 waits for side cuda:1" in runtime.log
    ends = [entry for entry in runtime.log if entry.startswith("wait event")]
    assert sorted(ends) == ["wait event of side cpu", "wait event of side cuda:1"]
    assert far.as_subclass(torch.Tensor).sum() == 4


def test_small_tensors_share_a_buffer() -> None:
    log = upload([(torch.zeros(2), torch.ones(2)) for _ in range(40)], buffer_bytes=1024, num_buffers=4)
    assert log.count("record side cpu") == 3  # 40 tensors of 64 bytes each, aligned


def test_no_more_memory_is_taken_than_there_is_to_copy() -> None:
    uploader = Uploader(FakeRuntime())
    uploader.reserve([(torch.zeros(1000), torch.ones(1000))])
    assert [buffer._memory.numel() for buffer in uploader._ring] == [4032]
    uploader.reserve([])
    assert uploader._ring == []


def test_refused_pinned_memory_is_replaced_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(num_bytes: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(upload_module, "_pinned", refuse)
    target = torch.zeros(1000)
    with caplog.at_level(logging.WARNING):
        upload([(target, torch.ones(1000))])
    assert target.sum() == 1000
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "refused" in caplog.text


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
def test_pieces_cover_everything_once(limit: int) -> None:
    for target in (torch.zeros(5, 6, 7), torch.zeros(5, 6, 7).transpose(0, 2), torch.zeros(1, 1, 9)[:, :, ::2]):
        source = torch.randn(target.shape)
        pieces = list(cut_alike(target, source, limit))
        assert all(piece.nbytes <= max(limit, 4) for piece, _ in pieces)
        assert sum(piece.numel() for piece, _ in pieces) == target.numel()
        for piece, part in pieces:
            piece.add_(part)
        assert torch.equal(target, source)


# -- whole restores ------------------------------------------------------------------------------


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """Every plain tensor is uploaded, through a ring of 3 x 128 bytes."""
    runtime = FakeRuntime()
    monkeypatch.setattr(loader_module, "Uploader", lambda: Uploader(runtime, 128, 3))
    monkeypatch.setattr(loader_module, "_is_uploadable", lambda target, source: type(target) in PLAIN)
    return runtime


PLAIN = (torch.Tensor, nn.Parameter)


def make(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5))
    model = model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {"model": model, "optimizer": optim.AdamW(model.parameters(), lr=0.1), "t": torch.randn(6, 7).t()}


def take_steps(state: dict[str, Any], count: int = 2) -> None:
    dtype = next(state["model"].parameters()).dtype
    for _ in range(count):
        state["model"](torch.randn(4, 3, 3, 3, dtype=dtype)).square().mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()


def bits(state: dict[str, Any]) -> Any:
    return fingerprint([dict(state["model"].state_dict()), state["optimizer"].state_dict(), state["t"]])


@pytest.mark.parametrize("is_fresh", [True, False], ids=["fresh optimizer", "live moments"])
def test_a_restore_goes_through_the_ring(runtime: FakeRuntime, is_fresh: bool) -> None:
    source, live = make(0), make(1)
    take_steps(source)
    if not is_fresh:
        take_steps(live, 1)
    moments = [values["exp_avg"] for values in live["optimizer"].state.values()]
    restore(live, save(source))
    assert bits(live) == bits(source)
    assert runtime.log.count("caller cpu waits for side cpu") == 1
    for kept, values in zip(moments, live["optimizer"].state.values(), strict=False):
        assert values["exp_avg"] is kept
    take_steps(live)  # the optimizer is in order, not only equal


def test_moments_of_another_type_than_their_parameter_are_exact(runtime: FakeRuntime) -> None:
    def widened(seed: int) -> dict[str, Any]:
        state = make(seed, torch.bfloat16)
        take_steps(state)
        for values in state["optimizer"].state.values():
            values["exp_avg"] = torch.randn(values["exp_avg"].shape, dtype=torch.float32)
        return state

    source, live = widened(0), make(1, torch.bfloat16)
    restore(live, save(source))
    assert bits(live) == bits(source)
    assert {values["exp_avg"].dtype for values in live["optimizer"].state.values()} == {torch.float32}


def test_an_upload_without_memory_leaves_everything_as_it_was(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uploader: Uploader, copies: object) -> None:
        raise torch.OutOfMemoryError("no room on the device")

    monkeypatch.setattr(Uploader, "reserve", refuse)
    source, live = make(0), make(1)
    take_steps(source)
    take_steps(live, 1)
    before = fingerprint(live)
    with pytest.raises(torch.OutOfMemoryError):
        restore(live, save(source))
    assert fingerprint(live) == before
    take_steps(live)
