"""One save through the pipeline: the first thing that goes wrong is what the caller hears of."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import asyncckpt as ac
from asyncckpt.errors import StorageError
from asyncckpt.stores import LocalStore
from asyncckpt.writer.rates import CompressionRates

NUM_TENSORS = 1000  # many more jobs than workers and places in their queue


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("failing", [1, 70, 500])
def test_a_failed_write_is_the_error_however_much_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, failing: int
) -> None:
    state = {f"t{index}": torch.full((200,), float(index)) for index in range(NUM_TENSORS)}
    put, num_calls = LocalStore.put, 0

    def fail_from_then_on(store: LocalStore, key: str, *rest: object, **options: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= failing:
            raise StorageError("no more", errno=errno.ENOSPC, key=key)
        put(store, key, *rest, **options)  # type: ignore[arg-type]

    with ac.Checkpointer(tmp_path, state, writer=ac.Writer(kind="thread", threads=threads)) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "put", fail_from_then_on)
            with pytest.raises(ac.StorageError, match="no more") as raised:
                ckpt.save(1).result(timeout=60)
        assert raised.value.errno == errno.ENOSPC
        assert not list((tmp_path / ".asyncckpt" / "partial").iterdir())
        ckpt.save(1).result(timeout=60)


def test_chunks_that_are_not_worth_compressing_are_frames_of_the_same_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"large": torch.arange(2**20, dtype=torch.float32), "small": torch.zeros(1000)}
    with ac.Checkpointer(tmp_path, state, writer=ac.Writer(kind="thread")) as ckpt:
        compressed = ckpt.save(1).result(timeout=60)
        state["large"] += 1
        monkeypatch.setattr(CompressionRates, "is_worth_compressing", lambda *_: False)
        stored = ckpt.save(2).result(timeout=60)
        assert compressed.stored_bytes < 0.9 * compressed.raw_bytes
        assert stored.stored_bytes > 0.99 * stored.raw_bytes  # the small one did not change, and is linked
        assert ckpt.verify(2, deep=True).ok
        assert torch.equal(ckpt.load(2)["large"], state["large"])
    metadata = "state/large/zarr.json"
    one, two = ((tmp_path / f"step-0000000{step}" / metadata).read_bytes() for step in (1, 2))
    assert one == two


def test_who_chooses_the_threads_gets_the_same_bytes_whatever_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressionRates, "is_worth_compressing", lambda *_: False)
    state = {"large": torch.arange(2**20, dtype=torch.float32)}
    with ac.Checkpointer(tmp_path, state, writer=ac.Writer(kind="thread", threads=1)) as ckpt:
        info = ckpt.save(1).result(timeout=60)
    assert info.stored_bytes < 0.9 * info.raw_bytes
