"""Any sequence of saves, deletions, rot and interrupted copies: the mirror offers only whole steps, and catches up."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CorruptError
from asyncckpt.policies import Keep, Mirror
from asyncckpt.repository import Catalog, CommittedStep, verify_step
from asyncckpt.stores import LocalStore
from asyncckpt.writer.mirror_worker import MirrorWorker
from tests.repository.test_crash_points import FILES

CommitStep = Callable[..., CommittedStep]
STEPS = st.integers(1, 5)
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["save", "delete", "damage"]), STEPS), st.tuples(st.just("copy"), st.integers(0, 8))
)


class StopError(Exception):
    """The copy is interrupted here."""


class Run:
    """A first root, its mirror, and a writer that copies until it is stopped."""

    def __init__(self, store: LocalStore, mirror: Path, commit: CommitStep, keep: Keep) -> None:
        self.store, self.commit = store, commit
        self.mirror = LocalStore(mirror)
        self.left = 0
        self.nonces = itertools.count()
        self.rewritten: set[int] = set()
        self.refused: set[str] = set()
        self.worker = MirrorWorker(store, Mirror(mirror, keep=keep), self.pace, incremental=True)

    def pace(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopError

    def act(self, action: str, number: int) -> None:
        is_there = number in Catalog(self.store).steps()
        if action == "save" and not is_there:
            nonce = next(self.nonces)
            self.commit(number, nonce=f"n{nonce}", files={**FILES, "state/v/c.0": b"%d" % nonce})
            self.rewritten.add(number)
        elif action == "delete" and is_there:
            CommittedStep(self.store, number).delete()
        elif action == "damage" and is_there:
            Path(self.store.location(f"step-{number:08}/state/w/c.0")).write_bytes(b"rotten....")
        elif action == "copy":
            with contextlib.suppress(StopError):
                self.copy_all(number)

    def copy_all(self, blocks: int) -> None:
        self.left = blocks
        while missing := self.worker.plan(self.rewritten, self.refused).missing:
            try:
                self.worker.copy(missing[0])
            except CorruptError:
                self.refused.add(missing[0].nonce)
            self.worker.prune()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, max_size=12), last=st.integers(1, 3))
def test_any_sequence(
    store: LocalStore, tmp_path: Path, commit_step: CommitStep, actions: list[tuple[str, int]], last: int
) -> None:
    for step in Catalog(store).steps():
        CommittedStep(store, step).delete()
    mirror = tmp_path / f"mirror-{len(list(tmp_path.iterdir()))}"
    run = Run(store, mirror, commit_step, Keep(last=last))
    try:
        for action, number in actions:
            run.act(action, number)
            catalog = Catalog(run.mirror)
            offered = catalog.committed() if mirror.exists() else []
            assert catalog.damaged == ()
            assert all(verify_step(committed).ok for committed in offered)
        run.copy_all(10_000)
        copies = {committed.step: committed.header.nonce for committed in Catalog(run.mirror).committed()}
        whole = [found.header for found in Catalog(store).committed() if verify_step(found).ok]
        if whole:
            assert copies.get(whole[0].step) == whole[0].nonce, "the newest whole step is there"
        assert run.worker.plan((), run.refused).missing == (), "and nothing is copied again"
    finally:
        run.worker.close()
