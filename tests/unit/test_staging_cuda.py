"""The order of CUDA calls, on a fake that records them: no GPU needed, none simulated."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator

import pytest
import torch

from asyncckpt.memory import Arena
from asyncckpt.staging import cuda as cuda_module
from asyncckpt.staging.cuda import CudaCopier, HostPinner


class FakeTensor:
    """A CPU tensor that says it lives on a CUDA device and records who streams it."""

    def __init__(self, values: list[float], device: int, log: list[str]) -> None:
        self.data = torch.tensor(values)
        self.device = torch.device("cuda", device)
        self._log = log

    def numel(self) -> int:
        return self.data.numel()

    def record_stream(self, stream: FakeStream) -> None:
        self._log.append(f"record_stream {stream.name}")


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self._log = log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class FakeRuntime:
    """The part of ``torch.cuda`` the copier uses."""

    def __init__(self, register_code: int = 0) -> None:
        self.log: list[str] = []
        self._register_code = register_code

    def Stream(self, device: int) -> FakeStream:
        return FakeStream(f"side{device}", self.log)

    def current_stream(self, device: int) -> FakeStream:
        return FakeStream(f"caller{device}", self.log)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")

    def Event(self) -> FakeEvent:
        return FakeEvent(self.log)

    def cudart(self) -> FakeRuntime:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.log.append(f"register {flags}")
        return self._register_code

    def cudaHostUnregister(self, address: int) -> int:
        self.log.append("unregister")
        return 0


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._stream = ""

    def record(self, stream: FakeStream) -> None:
        self._stream = stream.name
        self._log.append(f"record {stream.name}")

    def synchronize(self) -> None:
        self._log.append(f"wait event of {self._stream}")


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(4096, shared=False)
    yield arena
    arena.close()


@pytest.fixture(autouse=True)
def recorded_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Target:
        def __init__(self, arena: Arena, offset: int) -> None:
            self._address = arena.address + offset

        def copy_(self, source: FakeTensor, *, non_blocking: bool) -> None:
            assert non_blocking
            source._log.append("copy")
            ctypes.memmove(self._address, source.data.data_ptr(), source.data.nbytes)

    monkeypatch.setattr(cuda_module, "arena_view", lambda arena, offset, like: Target(arena, offset))


def copy(runtime: FakeRuntime, tensors: list[FakeTensor], arena: Arena) -> None:
    offsets = [64 * index for index in range(len(tensors))]
    CudaCopier(runtime).copy(tensors, offsets, arena)  # type: ignore[arg-type]


def test_copy_is_ordered_after_the_caller_and_waited_for(arena: Arena) -> None:
    runtime = FakeRuntime()
    copy(runtime, [FakeTensor([1.0, 2.0], 0, runtime.log), FakeTensor([3.0], 0, runtime.log)], arena)
    assert runtime.log == [
        "side0 waits for caller0",
        "enter side0",
        "copy",
        "record_stream side0",
        "copy",
        "record_stream side0",
        "record side0",
        "leave side0",
        "wait event of side0",
    ]
    assert torch.frombuffer(arena.buffer, dtype=torch.float32, count=1, offset=64).item() == 3.0


def test_devices_copy_side_by_side_before_any_is_waited_for(arena: Arena) -> None:
    runtime = FakeRuntime()
    copy(runtime, [FakeTensor([1.0], 0, runtime.log), FakeTensor([2.0], 1, runtime.log)], arena)
    assert runtime.log.index("record side1") < runtime.log.index("wait event of side0")
    assert runtime.log[-2:] == ["wait event of side0", "wait event of side1"]


def test_empty_tensors_start_no_stream(arena: Arena) -> None:
    runtime = FakeRuntime()
    copy(runtime, [FakeTensor([], 0, runtime.log)], arena)
    assert runtime.log == []


def test_side_stream_is_made_once(arena: Arena) -> None:
    runtime = FakeRuntime()
    copier = CudaCopier(runtime)
    tensor = FakeTensor([1.0], 0, runtime.log)
    copier.copy([tensor], [0], arena)  # type: ignore[list-item]
    stream = copier._streams[0]
    copier.copy([tensor], [0], arena)  # type: ignore[list-item]
    assert copier._streams == {0: stream}


def test_arena_is_pinned_once_and_unpinned(arena: Arena) -> None:
    runtime = FakeRuntime()
    pinner = HostPinner(runtime)
    assert pinner.pin(arena)
    assert pinner.pin(arena)
    pinner.unpin(arena)
    pinner.unpin(arena)
    assert runtime.log == ["register 1", "unregister"]


def test_refused_pinning_warns_once_and_is_not_tried_again(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    runtime = FakeRuntime(register_code=2)
    pinner = HostPinner(runtime)
    with caplog.at_level(logging.WARNING):
        assert not pinner.pin(arena)
        assert not pinner.pin(arena)
    pinner.unpin(arena)
    assert runtime.log == ["register 1"]
    assert len(caplog.records) == 1
    assert "memlock" in caplog.text
