"""Which save the writer begins, and which one it puts back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import anyio
import msgspec
import pytest

from asyncckpt.writer.messages import More, Save
from asyncckpt.writer.pending import PendingSaves

pytestmark = pytest.mark.anyio
NOTHING = msgspec.Raw(b"[]")


def save(save_id: int, *, last: bool = True) -> Save:
    return Save(
        save_id, 100 + save_id, "regular", f"nonce{save_id}", "run", "", [], {}, NOTHING, NOTHING, NOTHING, 0.0, 1,
        last, NOTHING,
    )  # fmt: skip


def more(save_id: int, *, last: bool) -> More:
    return More(save_id, 1, last, NOTHING)


@pytest.fixture
def pending() -> Iterator[PendingSaves]:
    pending = PendingSaves()
    yield pending
    pending.close()


async def begin(pending: PendingSaves) -> int | None:
    with anyio.fail_after(10):
        begun = await pending.begin_next()
    return None if begun is None else begun.save.save_id


async def begin_all(pending: PendingSaves) -> list[int]:
    begun = []
    while (save_id := await begin(pending)) is not None:
        begun.append(save_id)
        pending.end_current()
    return begun


@pytest.mark.parametrize(
    ("order", "begun"),
    [
        ([], [1, 2, 3]),
        ([3, 1, 2], [3, 1, 2]),
        ([2], [2, 1, 3]),  # what is not named comes later, oldest first
        ([9, 3], [3, 1, 2]),
    ],
)
async def test_the_oldest_begins_unless_it_was_ordered_otherwise(
    pending: PendingSaves, order: Sequence[int], begun: list[int]
) -> None:
    for save_id in (1, 2, 3):
        pending.add(save(save_id))
    pending.reorder(order)
    pending.end()
    assert await begin_all(pending) == begun


async def test_who_waits_for_a_save_is_woken_by_one_and_by_the_end(pending: PendingSaves) -> None:
    begun: list[int | None] = []

    async def begin_two() -> None:
        begun.append(await begin(pending))
        pending.end_current()
        begun.append(await begin(pending))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin_two)
        await anyio.wait_all_tasks_blocked()
        assert begun == []
        pending.add(save(1))
        await anyio.wait_all_tasks_blocked()
        assert begun == [1]
        pending.end()
    assert begun == [1, None]


@pytest.mark.parametrize(
    ("order", "is_late"),
    [
        ([], False),
        ([2, 1], True),
        ([1, 2], False),
        ([2], False),  # a plan that does not know the current save was made before it, or gave it up
        ([1], False),
    ],
)
async def test_a_save_is_late_when_both_are_ordered_and_the_other_goes_first(
    pending: PendingSaves, order: Sequence[int], is_late: bool
) -> None:
    pending.add(save(1))
    pending.add(save(2))
    assert await begin(pending) == 1
    pending.reorder(order)
    assert pending.is_late() is is_late


async def test_nothing_is_late_while_nothing_is_written_or_nothing_waits(pending: PendingSaves) -> None:
    pending.add(save(1))
    pending.reorder([2, 1])
    assert not pending.is_late()
    await begin(pending)
    assert not pending.is_late()
    pending.add(save(2))
    assert pending.is_late()


async def test_a_streamed_save_is_never_late(pending: PendingSaves) -> None:
    pending.add(save(1, last=False))
    pending.add(save(2))
    pending.reorder([2, 1])
    assert await begin(pending) == 2
    pending.end_current()
    assert await begin(pending) == 1
    pending.add(save(3))
    pending.reorder([3, 1])
    assert not pending.is_late()


async def test_what_is_put_back_begins_again_after_what_it_waits_for(pending: PendingSaves) -> None:
    pending.add(save(1))
    pending.add(save(2))
    await begin(pending)
    pending.reorder([2, 1])
    pending.put_back()
    assert pending.current is None
    assert len(pending) == 2
    pending.end()
    assert await begin_all(pending) == [2, 1]
    assert len(pending) == 0


async def test_only_what_has_not_begun_can_be_withdrawn(pending: PendingSaves) -> None:
    pending.add(save(1))
    pending.add(save(2))
    await begin(pending)
    assert [pending.drop(save_id) for save_id in (1, 2, 3)] == [False, True, False]
    assert len(pending) == 1
    pending.put_back()
    assert pending.drop(1)
    pending.end()
    assert await begin(pending) is None


async def test_the_parts_of_a_streamed_save_end_with_the_last_one(pending: PendingSaves) -> None:
    pending.add(save(1, last=False))
    begun = await pending.begin_next()
    assert begun is not None
    pending.add_part(more(1, last=False))
    pending.add_part(more(1, last=True))
    pending.add_part(more(7, last=True))  # of a save that failed
    assert [part.last async for part in begun.receive] == [False, False, True]


@pytest.mark.parametrize("end", ["drop", "end"])
async def test_a_streamed_save_ends_incomplete_when_it_is_dropped_or_the_trainer_is_gone(
    pending: PendingSaves, end: str
) -> None:
    pending.add(save(1, last=False))
    begun = await pending.begin_next()
    assert begun is not None
    assert not pending.drop(1) if end == "drop" else pending.end() is None
    assert [part.last async for part in begun.receive] == [False]
