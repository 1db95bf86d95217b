"""Retention in the writer: what is reported when something cannot be removed."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.errors import StorageError
from asyncckpt.repository import Catalog, prepare_root
from asyncckpt.testing import Fault, FaultStore
from asyncckpt.writer.pruning import Pruner


@pytest.fixture
def root(tmp_path: Path) -> Path:
    keep_all = ac.Keep(last=None)
    with ac.Checkpointer(tmp_path, {"w": torch.ones(3)}, keep=keep_all, writer=ac.Writer(kind="thread")) as ckpt:
        for step in range(1, 6):
            ckpt.save(step).result(timeout=60)
    return tmp_path


def test_what_was_removed_is_reported_although_something_could_not_be(root: Path) -> None:
    fault = Fault(call="delete", key="step-00000002/zarr.json", error=StorageError("no", errno=errno.EACCES))
    store = FaultStore(prepare_root(root), [fault])
    pruner = Pruner(store, ac.Keep(last=1))
    removed, failure = pruner.run(datetime.now(UTC))
    assert failure is not None
    assert failure.errno == errno.EACCES
    assert sorted(decision.step for decision in removed) == [1, 3, 4]
    assert Catalog(store).steps() == [2, 5]
    removed, failure = pruner.run(datetime.now(UTC))
    assert failure is None
    assert [decision.step for decision in removed] == [2]
    assert Catalog(store).steps() == [5]
