"""Ranks agree on a step to stop after, through a store. The store here is torch's own, in one process."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from asyncckpt.preemption.agreement import StopAgreement, agreement_of_group


@pytest.fixture
def ranks() -> list[StopAgreement]:
    store = dist.HashStore()
    return [StopAgreement(store, rank, 3) for rank in range(3)]


def test_nobody_is_told_to_stop_before_anybody_says_so(ranks: list[StopAgreement]) -> None:
    for rank in ranks:
        rank.join()
    assert not any(rank.is_requested() for rank in ranks)
    ranks[1].say(5)
    assert all(rank.is_requested() for rank in ranks)


def test_the_highest_step_anybody_has_passed_counts_once_all_have_said(ranks: list[StopAgreement]) -> None:
    for rank in ranks:
        rank.join()
    for rank, passed in zip(ranks, (4, 5, -1), strict=True):
        assert ranks[0].stop_after() is None or rank is ranks[0]
        rank.say(passed)
    assert [rank.stop_after() for rank in ranks] == [5, 5, 5]


def test_ranks_without_a_checkpointer_are_not_waited_for(ranks: list[StopAgreement]) -> None:
    ranks[0].join()
    ranks[2].join()
    ranks[0].say(7)
    assert ranks[0].stop_after() is None
    ranks[2].say(6)
    assert ranks[0].stop_after() == 7


def test_without_a_process_group_there_is_nobody_to_agree_with() -> None:
    assert agreement_of_group() is None
