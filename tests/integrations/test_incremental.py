"""Incremental saves: what did not change is linked, and every step stays complete and independent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncckpt as ac
from asyncckpt.errors import StorageError
from asyncckpt.format.layout import plan_layout
from asyncckpt.repository import CommittedStep, Decision, RetentionPlan, execute_retention
from asyncckpt.stores import LocalStore
from asyncckpt.stores.contract import StoreProperties
from asyncckpt.testing import Fault, FaultStore
from asyncckpt.writer import jobs, service

THREAD = ac.Writer(kind="thread", threads=2)
State = dict[str, torch.Tensor]


@pytest.fixture(params=["syncfs", "each"])
def faults(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultStore:
    """The store that writer threads use for ``tmp_path/run``, in both ways of making files durable."""
    store = FaultStore(LocalStore(tmp_path / "run", flush=request.param))
    monkeypatch.setattr(service, "open_store", lambda url: store)
    return store


@contextmanager
def run(tmp_path: Path, state: State, *, keep: int | None = None, **options: Any) -> Iterator[ac.Checkpointer]:
    options.setdefault("writer", THREAD)
    with ac.Checkpointer(tmp_path / "run", state, keep=ac.Keep(last=keep), **options) as ckpt:
        yield ckpt


def make_state(seed: int = 0) -> State:
    """Tensors of every size class: a file written at once, a streamed one, a shard, and one in the header."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "frozen": torch.randn(1_000, generator=generator),
        "frozen_large": torch.randn(500_000, generator=generator),
        "frozen_shard": torch.randn(1_100, 1_000, generator=generator),
        "trained": torch.randn(2_000, generator=generator),
        "trained_shard": torch.randn(1_100, 1_000, generator=generator),
        "scalar": torch.tensor(float(seed)),
    }


def train(state: State) -> None:
    for name in ("trained", "trained_shard", "scalar"):
        state[name] += 1


def chunk_files(tmp_path: Path, step: int) -> dict[str, os.stat_result]:
    """Every chunk or shard file of *step* below ``state``: ``{"w/c.0": stat}``."""
    top = tmp_path / "run" / f"step-{step:08}" / "state"
    return {str(path.relative_to(top)): path.stat() for path in top.rglob("c.*")}


def shared(tmp_path: Path, one: int, other: int) -> set[str]:
    first, second = chunk_files(tmp_path, one), chunk_files(tmp_path, other)
    return {key for key in first.keys() & second.keys() if first[key].st_ino == second[key].st_ino}


def frozen_keys(tmp_path: Path, step: int) -> set[str]:
    return {key for key in chunk_files(tmp_path, step) if key.startswith("frozen")}


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_whole(ckpt: ac.Checkpointer, step: int, expected: State) -> None:
    assert ckpt.verify(step).damaged == ()
    loaded = ckpt.load(step)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def save(ckpt: ac.Checkpointer, step: int) -> ac.SaveStats:
    saving = ckpt.save(step)
    saving.result(timeout=60)
    return saving.stats


def test_frozen_files_are_shared_and_the_others_are_new(tmp_path: Path, faults: FaultStore) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        first = save(ckpt, 1)
        expected = copied(state)
        train(state)
        second = save(ckpt, 2)
        assert_whole(ckpt, 1, expected)
        assert_whole(ckpt, 2, state)
    files = chunk_files(tmp_path, 2)
    assert shared(tmp_path, 1, 2) == {"frozen/c.0", "frozen_large/c.0", "frozen_shard/c.0.0"}
    assert {key: status.st_nlink for key, status in files.items()} == {
        key: 2 if key.startswith("frozen") else 1 for key in files
    }
    assert first.linked_bytes == 0
    assert second.linked_bytes == sum(status.st_size for status in files.values() if status.st_nlink == 2)
    step = tmp_path / "run" / "step-00000002"
    sizes = [path.stat() for path in step.rglob("*") if path.is_file() and path != step / "zarr.json"]
    assert second.stored_bytes == sum(status.st_size for status in sizes)
    assert second.stored_bytes - second.linked_bytes == sum(s.st_size for s in sizes if s.st_nlink == 1)


def test_only_the_shard_files_that_changed_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_chunk_bytes", lambda _: 2**12)
    monkeypatch.setattr(jobs, "plan_layout", partial(plan_layout, shard_bytes=2**16))
    state = {"embedding": torch.randn(1024, 64)}
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        state["embedding"][300] += 1
        save(ckpt, 2)
        assert_whole(ckpt, 2, state)
    assert chunk_files(tmp_path, 2).keys() - shared(tmp_path, 1, 2) == {"embedding/c.1.0"}
    assert shared(tmp_path, 1, 2) == {"embedding/c.0.0", "embedding/c.2.0", "embedding/c.3.0"}


def by_api(ckpt: ac.Checkpointer, tmp_path: Path, step: int) -> None:
    ckpt.delete(step)


def by_retention(ckpt: ac.Checkpointer, tmp_path: Path, step: int) -> None:
    plan = RetentionPlan(remove=(Decision(step, "test"),))
    assert execute_retention(LocalStore(tmp_path / "run"), plan) == [step]


def by_hand(ckpt: ac.Checkpointer, tmp_path: Path, step: int) -> None:
    shutil.rmtree(tmp_path / "run" / f"step-{step:08}")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, State]]:
    """A root with five steps that share their frozen files, and what each holds."""
    path = tmp_path_factory.mktemp("chain")
    state = make_state()
    expected: dict[int, State] = {}
    with run(path, state) as ckpt:
        for step in range(5):
            save(ckpt, step)
            expected[step] = copied(state)
            train(state)
    assert {chunk_files(path, 2)[key].st_nlink for key in frozen_keys(path, 2)} == {5}
    return path, expected


@pytest.mark.parametrize("victim", range(5))
@pytest.mark.parametrize("remove", [by_api, by_retention, by_hand])
def test_any_step_of_a_chain_can_go(
    tmp_path: Path, chain: tuple[Path, dict[int, State]], remove: Callable[..., None], victim: int
) -> None:
    path, expected = chain
    shutil.copytree(path / "run", tmp_path / "run", copy_function=os.link)
    left = {step: tensors for step, tensors in expected.items() if step != victim}
    state = copied(expected[4])
    with run(tmp_path, state) as ckpt:
        remove(ckpt, tmp_path, victim)
        assert save(ckpt, 5).linked_bytes > 0
        left[5] = state
        assert [info.step for info in ckpt.checkpoints()] == sorted(left)
        for step, tensors in left.items():
            assert_whole(ckpt, step, tensors)
    assert shared(tmp_path, max(left.keys() - {5}), 5) >= frozen_keys(tmp_path, 5)


def test_retention_of_linked_steps_keeps_what_it_says(tmp_path: Path) -> None:
    state = make_state()
    with run(tmp_path, state, keep=2) as ckpt:
        for step in range(6):
            train(state)
            save(ckpt, step)
    with run(tmp_path, state) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [4, 5]
        assert_whole(ckpt, 5, state)
        assert ckpt.verify(4).ok
    assert {chunk_files(tmp_path, 5)[key].st_nlink for key in frozen_keys(tmp_path, 5)} == {2}


@pytest.mark.parametrize(
    "code", [errno.EMLINK, errno.EXDEV, errno.EPERM, errno.ENOENT, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get
)
def test_what_cannot_be_linked_is_written(tmp_path: Path, faults: FaultStore, code: int) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        faults.inject(Fault("link", key="*/frozen_large/*", error=code))
        stats = save(ckpt, 2)
        assert stats.linked_bytes > 0
        assert_whole(ckpt, 2, state)
    assert chunk_files(tmp_path, 2).keys() - shared(tmp_path, 1, 2) == {"frozen_large/c.0"}


@pytest.mark.parametrize(("call", "code"), [("link", errno.EACCES), ("link", errno.ENOSPC), ("put", errno.ENOSPC)])
def test_a_failed_save_leaves_the_previous_step_alone(tmp_path: Path, faults: FaultStore, call: str, code: int) -> None:
    """The put that fails is that of the index, when everything is linked already."""
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        faults.inject(Fault(call, key="*/frozen/c.0" if call == "link" else "*/index/*", error=code))
        saving = ckpt.save(2)
        assert isinstance(saving.exception(timeout=60), StorageError)
        assert os.listdir(tmp_path / "run" / ".asyncckpt" / "partial") == []
        assert {status.st_nlink for status in chunk_files(tmp_path, 1).values()} == {1}
        assert_whole(ckpt, 1, state)
        assert save(ckpt, 2).linked_bytes > 0
        assert_whole(ckpt, 2, state)


def test_a_store_without_hard_links_writes_everything(tmp_path: Path, faults: FaultStore) -> None:
    faults.inner.properties = StoreProperties(atomic_create=True, hard_links=False, rename=True)
    faults.inject(Fault("link", error=errno.EACCES, persistent=True))
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        assert save(ckpt, 2).linked_bytes == 0
    assert shared(tmp_path, 1, 2) == set()


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_incremental_saves_can_be_turned_off(tmp_path: Path, kind: Any) -> None:
    state = make_state()
    with run(tmp_path, state, writer=ac.Writer(kind=kind, incremental=False)) as ckpt:
        save(ckpt, 1)
        assert save(ckpt, 2).linked_bytes == 0
    assert shared(tmp_path, 1, 2) == set()


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_resumed_run_links_to_the_newest_step_of_the_earlier_one(tmp_path: Path, kind: Any) -> None:
    state = make_state()
    with run(tmp_path, state, writer=ac.Writer(kind=kind)) as ckpt:
        save(ckpt, 1)
        state["frozen"] += 1
        save(ckpt, 2)
    resumed = make_state(seed=1)
    with run(tmp_path, resumed, writer=ac.Writer(kind=kind)) as ckpt:
        assert ckpt.restore() is not None
        train(resumed)
        assert save(ckpt, 3).linked_bytes > 0
        assert_whole(ckpt, 3, resumed)
    assert shared(tmp_path, 2, 3) == frozen_keys(tmp_path, 3)
    assert "frozen/c.0" not in shared(tmp_path, 1, 3)


def test_the_first_save_of_a_run_looks_further_than_a_step_with_a_damaged_header(tmp_path: Path) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
    flip_a_byte(tmp_path / "run" / "step-00000002" / "zarr.json")
    with run(tmp_path, state) as ckpt:
        save(ckpt, 3)
        assert_whole(ckpt, 3, state)
    assert shared(tmp_path, 1, 3) == chunk_files(tmp_path, 3).keys()


@pytest.mark.parametrize("name", ["c.0", "zarr.json"])
def test_a_damaged_index_is_ignored(tmp_path: Path, name: str) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
    flip_a_byte(tmp_path / "run" / "step-00000001" / "index" / "rank-00000" / name)
    with run(tmp_path, state) as ckpt:
        assert save(ckpt, 2).linked_bytes == 0
        assert_whole(ckpt, 2, state)
        assert save(ckpt, 3).linked_bytes > 0


def test_within_a_run_the_writer_remembers_what_it_wrote(tmp_path: Path) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        flip_a_byte(tmp_path / "run" / "step-00000001" / "index" / "rank-00000" / "c.0")
        assert save(ckpt, 2).linked_bytes > 0
        assert_whole(ckpt, 2, state)


def test_the_beginning_of_a_file_does_not_vouch_for_the_rest(tmp_path: Path) -> None:
    state: State = {"embedding": torch.randn(1000, 1000), "frozen": torch.randn(1000, 1000)}
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        state["embedding"][-1] += 1
        stats = save(ckpt, 2)
        assert_whole(ckpt, 2, state)
        state["frozen"][0] += 1  # what was linked once is followed like what was written
        save(ckpt, 3)
        assert_whole(ckpt, 3, state)
    assert stats.linked_bytes > 0
    assert shared(tmp_path, 1, 2) == {"frozen/c.0.0"}
    assert shared(tmp_path, 2, 3) == {"embedding/c.0.0"}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replace_by_link(path: Path) -> None:
    target = path.with_name("moved")
    path.rename(target)
    path.symlink_to(target)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_array_by_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, replace_by_link, replace_by_directory, replace_array_by_file, os.unlink])
@pytest.mark.parametrize("name", ["frozen/c.0", "frozen_shard/c.0.0"])
def test_a_file_that_is_not_what_was_written_is_not_linked(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        damage(tmp_path / "run" / "step-00000001" / "state" / name)
        save(ckpt, 2)
        assert_whole(ckpt, 2, state)
        assert save(ckpt, 3).linked_bytes > 0
    assert name not in shared(tmp_path, 1, 2)
    assert name in shared(tmp_path, 2, 3)


@pytest.mark.parametrize("remove", [by_api, by_retention, by_hand])
def test_a_step_that_was_removed_is_followed_by_links_to_the_one_before(
    tmp_path: Path, remove: Callable[..., None]
) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        train(state)
        save(ckpt, 2)
        remove(ckpt, tmp_path, 2)
        train(state)
        save(ckpt, 3)
        assert_whole(ckpt, 3, state)
    assert shared(tmp_path, 1, 3) == frozen_keys(tmp_path, 3)


def test_a_step_that_was_set_aside_as_damaged_is_not_linked_to(tmp_path: Path) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        train(state)
        save(ckpt, 2)
        newest = copied(state)
        flip_a_byte(tmp_path / "run" / "step-00000002" / "state" / "trained_shard" / "c.0.0")
        with pytest.warns(RuntimeWarning, match="step 2"):
            found = ckpt.restore()
        assert found is not None
        assert found.step == 1
        for name, tensor in newest.items():
            state[name].copy_(tensor)
        save(ckpt, 2)
        assert_whole(ckpt, 2, newest)


def test_a_step_that_was_replaced_behind_the_writer_is_not_linked_to(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1000)}
    with run(tmp_path / "other", {"w": torch.ones(1000)}, compression="none") as ckpt:
        save(ckpt, 1)
    with run(tmp_path, state, compression="none") as ckpt:
        save(ckpt, 1)
        shutil.rmtree(tmp_path / "run" / "step-00000001")
        (tmp_path / "other" / "run" / "step-00000001").rename(tmp_path / "run" / "step-00000001")
        save(ckpt, 2)
        assert_whole(ckpt, 2, state)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(((1000,), torch.float32), ((1000,), torch.int32), id="dtype"),
        pytest.param(((30, 40), torch.float32), ((40, 30), torch.float32), id="shape"),
        pytest.param(((2000,), torch.uint8), ((500,), torch.complex32), id="torch dtype"),
    ],
)
def test_the_same_bytes_of_another_type_are_not_linked(
    tmp_path: Path, before: tuple[tuple[int, ...], torch.dtype], after: tuple[tuple[int, ...], torch.dtype]
) -> None:
    for step, (shape, dtype) in enumerate([before, after]):
        with run(tmp_path, {"w": torch.zeros(shape, dtype=dtype)}) as ckpt:
            assert save(ckpt, step).linked_bytes == 0
            assert ckpt.verify(step).ok
            loaded = ckpt.load(step)["w"]
            assert (loaded.dtype, tuple(loaded.shape)) == (dtype, shape)
    assert chunk_files(tmp_path, 0).keys() == chunk_files(tmp_path, 1).keys()


def test_another_compression_is_not_linked(tmp_path: Path) -> None:
    state = make_state()
    for step, compression in enumerate(["fast", "small", "none", "none"]):
        with run(tmp_path, state, compression=compression) as ckpt:
            is_linked = save(ckpt, step).linked_bytes > 0
            assert is_linked == (step == 3)
            assert_whole(ckpt, step, state)


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_state_larger_than_the_memory_limit_is_linked_too(tmp_path: Path, kind: Any) -> None:
    state = {f"t{index}": torch.full((100_000,), float(index)) for index in range(20)}
    limit = ac.Staging(memory_limit=2_000_000)
    with run(tmp_path, state, staging=limit, writer=ac.Writer(kind=kind)) as ckpt:
        save(ckpt, 1)
        state["t7"] += 1
        save(ckpt, 2)
        assert_whole(ckpt, 2, state)
    assert chunk_files(tmp_path, 2).keys() - shared(tmp_path, 1, 2) == {"t7/c.0"}


def test_a_step_of_links_records_the_digests_of_the_files(tmp_path: Path) -> None:
    state = make_state()
    with run(tmp_path, state) as ckpt:
        save(ckpt, 1)
        save(ckpt, 2)
    store = LocalStore(tmp_path / "run")
    first, second = ({record.key: record for record in CommittedStep(store, step).read_index()} for step in (1, 2))
    assert first == second
