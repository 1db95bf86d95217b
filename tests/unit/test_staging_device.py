"""The pure parts of snapshots on devices, and the tensor operations, which work on CPU tensors, too."""

from __future__ import annotations

import itertools

import pytest
import torch
from staging_sim import SimLeaf

from asyncckpt.memory import Arena
from asyncckpt.staging.cpu import arena_view
from asyncckpt.staging.device_memory import DeviceMemory, fits
from asyncckpt.staging.ops import DeviceOps, pieces_of
from asyncckpt.staging.packing import SMALL_BYTES, packing_choices, plan_packing
from asyncckpt.staging.plan import plan_staging

GIB = 2**30


class OnCuda:
    """As much of a CUDA tensor as the plan looks at."""

    is_cuda = True

    def __init__(self, num_bytes: int, index: int = 0) -> None:
        self._num_bytes = num_bytes
        self.device = torch.device("cuda", index)
        self.shape = (num_bytes,)

    def numel(self) -> int:
        return self._num_bytes

    def element_size(self) -> int:
        return 1


def test_small_tensors_of_a_device_lie_side_by_side() -> None:
    sizes = [100, 10 * SMALL_BYTES, 3, 0, 10 * SMALL_BYTES, 64]
    leaves = [SimLeaf(f"{index}", OnCuda(size)) for index, size in enumerate(sizes)]
    leaves += [SimLeaf("other", OnCuda(5, 1)), SimLeaf("host", torch.zeros(7, dtype=torch.uint8))]
    plan = plan_staging(leaves, None)
    (segment,) = plan.segments
    small = plan_packing([0, 2, 3, 5], segment.offsets, [*sizes, 5, 7])
    assert len(small.runs) == 1
    assert small.runs[0].num_bytes <= 128 + 64 + 64
    assert len(plan_packing(range(6), segment.offsets, [*sizes, 5, 7]).runs) == 1
    places = sorted(zip(segment.offsets, [*sizes, 5, 7], strict=True))
    assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(places))
    assert segment.num_bytes <= sum(sizes) + 12 + 64 * len(leaves)


def test_the_host_holds_one_copy_of_the_state() -> None:
    leaves = [SimLeaf(f"{index}", OnCuda(1 + index * 1000)) for index in range(10_000)]
    plan = plan_staging(leaves, None)
    assert len(plan.segments) == 1
    assert plan.arena_bytes <= plan.raw_bytes + 256 * 2**20


def test_separate_runs_keep_the_alignment_of_the_arena() -> None:
    packing = plan_packing([4, 0, 2], [0, 64, 192, 256, 448], [10, 100, 3, 150, 64])
    assert packing.positions == (0, 2, 4)
    assert [run.arena_offset for run in packing.runs] == [0, 192, 448]
    assert all(place % 64 == 0 for place in packing.places)
    assert packing.places == tuple(run.buffer_offset for run in packing.runs)
    assert packing.num_bytes == 192


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", [(0, 1, 2, 3), (0, 2, 3), (0, 2), ()]),
        ("device", [(0, 1, 2, 3), (0, 2, 3), (0, 2), ()]),
        ("overlap", [(0, 2, 3), (0, 2), ()]),
        ("blocking", [(0, 2), ()]),
    ],
)
def test_choices_of_what_to_gather(mode: str, expected: list[tuple[int, ...]]) -> None:
    big = SMALL_BYTES + 1
    assert packing_choices(mode, [1, big, SMALL_BYTES, big], [True, True, False, False]) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "free", "reserved", "in_use", "peak", "comfortably", "expected"),
    [
        (10, 40, 40, 10, 30, False, True),
        (50, 40, 40, 10, 30, False, True),
        (51, 40, 40, 10, 30, False, False),  # training needs 30 again
        (42, 40, 40, 10, 30, True, True),  # a tenth of 80 stays free
        (43, 40, 40, 10, 30, True, False),
        (10, 40, 40, 30, 31, True, False),  # nothing was trained yet
        (10, 40, 40, 30, 31, False, True),
        (41, 40, 40, 40, 10, False, False),  # more is in use than ever before
    ],
)
def test_memory_that_a_snapshot_may_take(
    num_bytes: int, free: int, reserved: int, in_use: int, peak: int, comfortably: bool, expected: bool
) -> None:
    memory = DeviceMemory(free * GIB, reserved * GIB, in_use * GIB, peak * GIB)
    assert fits(num_bytes * GIB, memory, comfortably=comfortably) is expected


SOURCES = [
    torch.randn(100, 7),
    torch.randn(7, 100).t(),
    torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    torch.tensor(2.5),
    torch.randn(9).to(torch.bfloat16),
    torch.randn(3, dtype=torch.complex64),
    torch.tensor([True, False]),
    torch.nn.Parameter(torch.randn(5)),
    torch.randn(2, 3).expand(4, 2, 3),
    torch.randn(6).to(torch.float8_e4m3fn),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.dtype}{tuple(source.shape)}")
@pytest.mark.parametrize("gathered", [False, True])
def test_operations_are_exact(source: torch.Tensor, gathered: bool) -> None:
    ops = DeviceOps()
    arena = Arena.create(4096, shared=False)
    source = source.detach()
    num_bytes = source.numel() * source.element_size()
    if gathered:
        buffer = torch.zeros(4096, dtype=torch.uint8)
        view = ops.view(buffer, 64, source)
        ops.gather([view], [source])
        ops.download(arena, 128, buffer[64 : 64 + num_bytes])
    else:
        ops.download(arena, 128, source)
    copied = arena_view(arena, 128, source).clone()
    assert torch.equal(_bytes_of(copied), _bytes_of(source))
    arena.close()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dim() else tensor


def test_strided_tensors_are_cut_so_that_torch_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncckpt.staging.ops._PIECE_BYTES", 256)
    source = torch.randn(1, 40, 30).transpose(1, 2)
    target = torch.zeros(source.shape)
    pieces = list(pieces_of(target, source))
    assert len(pieces) > 10
    assert all(values.nbytes <= 256 and part.is_contiguous() for part, values in pieces)
    for part, values in pieces:
        part.copy_(values)
    assert torch.equal(target, source)
    whole = torch.randn(1000)
    assert len(list(pieces_of(torch.zeros(1000), whole))) == 1


def test_a_buffer_made_in_inference_mode_serves_after_it() -> None:
    ops = _Host()
    arena = Arena.create(4096, shared=False)
    with torch.inference_mode():
        source = torch.ones(4)
        buffer = ops.allocate(16, 0)
        ops.download(arena, 0, source)
    view = ops.view(buffer, 0, source)
    ops.gather([view], [source])
    ops.download(arena, 64, view)
    for offset in (0, 64):
        assert arena_view(arena, offset, torch.empty(4)).tolist() == [1, 1, 1, 1]
    arena.close()


class _Host(DeviceOps):
    """Where there is no device, the CPU is one."""

    def allocate(self, num_bytes: int, index: int) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "device", lambda *args: "cpu")
            return super().allocate(num_bytes, index)
