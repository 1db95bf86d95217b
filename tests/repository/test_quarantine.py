from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from asyncckpt.repository import Catalog, CommittedStep
from asyncckpt.repository.quarantine import quarantine_step
from asyncckpt.stores import LocalStore

CommitStep = Callable[..., CommittedStep]


def test_a_step_set_aside_is_whole_and_its_number_is_free(store: LocalStore, commit_step: CommitStep) -> None:
    commit_step(500)
    where = quarantine_step(store, 500)
    assert where.startswith(f"{store.root}/.asyncckpt/damaged/step-00000500-")
    assert sorted(os.listdir(where)) == ["index", "state", "zarr.json"]
    assert Catalog(store).steps() == []
    commit_step(500)
    assert Catalog(store).steps() == [500]


def test_a_step_is_only_moved_to_a_directory_that_is_durable(
    store: LocalStore, commit_step: CommitStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_step(500)
    calls: list[str] = []
    for name in ("open_barrier", "sync_directory", "rename"):
        real = getattr(store, name)
        monkeypatch.setattr(
            store, name, lambda *keys, name=name, real=real: (calls.append(f"{name} {keys[0]}"), real(*keys))[1]
        )
    quarantine_step(store, 500)
    assert calls == [
        "open_barrier .asyncckpt/damaged",
        "sync_directory .asyncckpt",
        "rename step-00000500",
        "sync_directory .asyncckpt/damaged",
        "sync_directory ",
    ]
