"""Which step all ranks stop after, agreed on through the store of the process group.

Ranks that stop at different steps hang: the one that goes on waits in a collective for the one that left. No
collective can settle it, because the ranks are not at the same place when they hear of it, and one may be in
the midst of another collective. So each rank, once it knows, says through the store which step it has passed, and
none passes a further one before it knows what all others have said. The step after the highest of those is
one that everybody reaches: whoever has passed less has not been kept from anything the others wait for.

A rank whose training thread is stuck in a collective, waiting for one that holds, answers all the same: its
thread here does.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["StopAgreement", "agreement_of_group"]

_PREFIX = "asyncckpt/preemption"
_REQUESTED = f"{_PREFIX}/requested"


class KeyValueStore(Protocol):
    """What is used of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class StopAgreement:
    """One rank's part; used by one thread. Every method may raise what the store raises when it is gone.

    Args:
        store: shared by all ranks of one start of the job.
        rank: this one.
        world_size: how many there are.
    """

    def __init__(self, store: KeyValueStore, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size

    def join(self) -> None:
        """This rank takes part; those that never do (they have no checkpointer) are not waited for."""
        self._store.set(self._joined(self._rank), "1")

    def is_requested(self) -> bool:
        """Whether any rank was told to stop."""
        return self._store.check([_REQUESTED])

    def say(self, passed: int) -> None:
        """This rank knows that the job is to stop, and has passed the step *passed* (-1: none)."""
        self._store.set(self._passed(self._rank), str(passed))
        self._store.set(_REQUESTED, "1")

    def stop_after(self) -> int | None:
        """The highest step that any rank has passed; None while one has not said."""
        answers = []
        for rank in range(self._world_size):
            if self._store.check([self._passed(rank)]):
                answers.append(int(self._store.get(self._passed(rank))))
            elif self._store.check([self._joined(rank)]):
                return None
        return max(answers)

    @staticmethod
    def _joined(rank: int) -> str:
        return f"{_PREFIX}/joined/{rank}"

    @staticmethod
    def _passed(rank: int) -> str:
        return f"{_PREFIX}/passed/{rank}"

    def __repr__(self) -> str:
        return f"<StopAgreement rank {self._rank} of {self._world_size}>"


def agreement_of_group() -> StopAgreement | None:
    """The agreement among the ranks of the default process group; None when there is nobody to agree with."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return StopAgreement(_get_default_store(), dist.get_rank(), dist.get_world_size())
