"""Plans, copies and slots."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import msgspec
import pytest
import torch

from asyncckpt.errors import InvalidOptionError, SnapshotMutatedError, StagingMemoryError
from asyncckpt.memory import Arena
from asyncckpt.model import TensorSpec
from asyncckpt.options import Staging
from asyncckpt.staging import stager as stager_module
from asyncckpt.staging.cpu import CpuCopier, arena_view
from asyncckpt.staging.plan import plan_staging
from asyncckpt.staging.slots import SlotPool
from asyncckpt.staging.stager import Stager


@dataclass(frozen=True)
class FakeLeaf:
    key: str
    tensor: torch.Tensor
    data_type: str = "float32"
    torch_dtype: str | None = None
    trained: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def leaves_of(*sizes: int) -> list[FakeLeaf]:
    return [FakeLeaf(f"state/t{index}", torch.arange(size, dtype=torch.float32)) for index, size in enumerate(sizes)]


def new_stager(**options: int) -> tuple[Stager, list[Arena]]:
    attached: list[Arena] = []
    stager = Stager(Staging(**options), shared=False, attach=attached.append, detach=attached.remove)  # type: ignore[arg-type]
    return stager, attached


def test_plan_aligns_offsets_and_encodes_specs() -> None:
    plan = plan_staging(leaves_of(3, 100, 0, 1), None)
    (segment,) = plan.segments
    assert segment.offsets == (0, 64, 512, 512)
    assert plan.raw_bytes == 4 * 104
    specs = msgspec.json.decode(segment.specs, type=list[TensorSpec])
    assert specs[1] == TensorSpec("state/t1", "float32", (100,), 64)


def test_plan_cuts_a_state_over_the_limit_into_halves() -> None:
    plan = plan_staging(leaves_of(16, 16, 16, 16, 16), 256)
    assert [(segment.start, segment.stop) for segment in plan.segments] == [(0, 2), (2, 4), (4, 5)]
    assert plan.arena_bytes == 128


def test_plan_refuses_a_tensor_larger_than_half_the_limit() -> None:
    with pytest.raises(InvalidOptionError, match=r"state/t1 alone has 512 bytes.*1024"):
        plan_staging(leaves_of(16, 128), 512)


def test_plan_is_reused_until_a_shape_changes() -> None:
    stager, _ = new_stager()
    first = stager.plan(leaves_of(3, 4))
    assert stager.plan(leaves_of(3, 4)) is first
    assert stager.plan(leaves_of(3, 5)) is not first
    stager.close([])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_copy_is_exact_for_every_memory_layout(threads: int) -> None:
    big = torch.randn(5_000_001)
    sources = [
        big,
        torch.randn(7),
        torch.randn(300, 400).t(),
        torch.randn(10)[::2],
        torch.tensor(3.5),
        torch.empty(0),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(6).to(torch.bfloat16),
        torch.tensor([True, False]),
    ]
    leaves = [FakeLeaf(str(index), source) for index, source in enumerate(sources)]
    (segment,) = plan_staging(leaves, None).segments
    arena = Arena.create(segment.num_bytes, shared=False)
    copier = CpuCopier(threads)
    copier.copy(sources, segment.offsets, arena)
    for source, offset in zip(sources, segment.offsets, strict=True):
        assert torch.equal(arena_view(arena, offset, source) if source.numel() else source, source)
    copier.close()
    arena.close()


def test_tensor_changed_by_another_thread_fails_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    stager, _ = new_stager()
    leaves = leaves_of(8)
    pool = SlotPool(1)
    plan = stager.plan(leaves)
    stager.reserve(pool.slots[0], plan)
    copy = stager._cpu.copy

    def copy_then_train(*args: object) -> None:
        copy(*args)  # type: ignore[arg-type]
        leaves[0].tensor.add_(1)

    monkeypatch.setattr(stager._cpu, "copy", copy_then_train)
    with pytest.raises(SnapshotMutatedError, match="state/t0"):
        stager.begin(leaves, plan.segments[0], pool.slots[0], ())
    stager.close(pool.slots)


def test_inference_tensors_have_no_version_and_are_copied() -> None:
    with torch.inference_mode():
        leaf = FakeLeaf("state/t", torch.ones(4))
    stager, _ = new_stager()
    pool = SlotPool(1)
    plan = stager.plan([leaf])
    stager.reserve(pool.slots[0], plan)
    stager.copy([leaf], plan.segments[0], pool.slots[0], pool.slots[0].arenas[0])
    assert arena_view(pool.slots[0].arenas[0], 0, torch.empty(4)).tolist() == [1, 1, 1, 1]
    stager.close(pool.slots)


def test_reserve_reuses_arenas_and_grows_them() -> None:
    stager, attached = new_stager()
    pool = SlotPool(1)
    slot = pool.slots[0]
    stager.reserve(slot, stager.plan(leaves_of(100)))
    (first,) = slot.arenas
    stager.reserve(slot, stager.plan(leaves_of(50)))
    assert slot.arenas == [first] == attached
    stager.reserve(slot, stager.plan(leaves_of(10_000_000)))
    assert slot.arenas != [first]
    assert attached == slot.arenas
    stager.close(pool.slots)


def test_refused_memory_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int, *, shared: bool) -> Arena:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(stager_module.Arena, "create", refuse)
    stager, _ = new_stager()
    with pytest.raises(StagingMemoryError, match=r"Staging\.slots"):
        stager.reserve(SlotPool(1).slots[0], stager.plan(leaves_of(4)))
    stager.close([])


def test_memory_of_a_slot_is_lent_and_then_serves_snapshots() -> None:
    stager, attached = new_stager()
    (slot,) = SlotPool(1).slots
    leaves = leaves_of(1000, 200)
    lent = stager.lend(slot, 4 * 1200)
    assert lent is not None
    assert len(lent) == 4 * 1200
    (arena,) = slot.arenas
    stager.reserve(slot, stager.plan(leaves))
    assert attached == [arena] == slot.arenas
    again = stager.lend(slot, 100)
    assert again is not None
    assert again.obj is lent.obj
    assert stager.lend(slot, arena.num_bytes + 1) is None  # a save would lose what it has committed
    assert slot.arenas == [arena]
    del lent, again
    stager.close([slot])


def test_memory_is_not_lent_beyond_a_limit_or_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    limited, _ = new_stager(memory_limit=10**6)
    assert limited.lend(SlotPool(1).slots[0], 100) is None
    stager, _ = new_stager()
    monkeypatch.setattr(stager_module, "available_memory", lambda: 1000)
    assert stager.lend(SlotPool(1).slots[0], 1001) is None


def test_prepare_commits_memory_without_touching_it() -> None:
    stager, attached = new_stager()
    pool = SlotPool(1)
    leaves = leaves_of(1_000_000)
    stager.prepare(pool.slots[0], stager.plan(leaves), leaves, ())
    stager.close(pool.slots)
    assert len(attached) == 1


def test_slots_skip_when_all_are_taken() -> None:
    pool = SlotPool(1)
    slot = pool.acquire("wait", lambda: False)
    assert slot is not None
    assert pool.acquire("skip", lambda: False) is None
    pool.release(slot)
    assert pool.acquire("skip", lambda: False) is slot


def test_slots_wait_until_one_is_released() -> None:
    pool = SlotPool(1)
    slot = pool.acquire("wait", lambda: False)
    assert slot is not None
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire("wait", lambda: False)))
    waiter.start()
    pool.release(slot)
    waiter.join()
    assert got == [slot]


def test_slots_supersede_frees_the_slot_of_an_older_save() -> None:
    pool = SlotPool(1)
    slot = pool.acquire("wait", lambda: False)
    assert slot is not None

    def withdraw() -> bool:
        pool.release(slot)
        return True

    assert pool.acquire("supersede", withdraw) is slot
