"""Saving and restoring through the public API, with the writer as a process and as a thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asyncckpt as ac
from tests.integrations.hand_overs import hand_overs_held

KINDS = ["process", "thread"]


class Training:
    """A small model with an optimizer that has state."""

    def __init__(self, seed: int = 0, width: int = 64) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rng": ac.RNG(),
            "epoch": 0,
        }

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 8)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def flat(self) -> torch.Tensor:
        moments = [
            value for entry in self.optimizer.state.values() for name, value in sorted(entry.items()) if name != "step"
        ]
        return torch.cat([tensor.detach().flatten() for tensor in [*self.model.parameters(), *moments]])


@pytest.fixture(params=KINDS)
def writer(request: pytest.FixtureRequest) -> ac.Writer:
    return ac.Writer(kind=request.param)


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, writer: ac.Writer) -> None:
    first = Training()
    with ac.Checkpointer(tmp_path / "run", first.state, writer=writer) as ckpt:
        assert ckpt.restore() is None
        first.train(3)
        first.state["epoch"] = 2
        saving = ckpt.save(3, metrics={"loss": 0.5})
        first.train(4)
        info = saving.result(timeout=60)
    second = Training(seed=1)
    with ac.Checkpointer(tmp_path / "run", second.state, writer=writer) as ckpt:
        found = ckpt.restore()
        assert found is not None
        assert (found.step, found.nonce, found.metrics["loss"]) == (3, info.nonce, 0.5)
        assert second.state["epoch"] == 2
        second.train(4)
    assert torch.equal(first.flat(), second.flat())
    assert first.scheduler.state_dict() == second.scheduler.state_dict()


def test_snapshot_is_the_state_at_save(tmp_path: Path, writer: ac.Writer) -> None:
    weights = torch.zeros(3_000_000)
    with ac.Checkpointer(tmp_path, {"w": weights}, writer=writer) as ckpt:
        saving = ckpt.save(1)
        weights.fill_(1.0)
        saving.result(timeout=60)
        assert not ckpt.load(1)["w"].any()


@pytest.mark.parametrize("compression", ["fast", "small", "none", [{"name": "bytes"}, {"name": "gzip"}]])
def test_every_preset_round_trips_bit_for_bit(tmp_path: Path, compression: Any) -> None:
    torch.manual_seed(0)
    state = {
        "f32": torch.randn(1200, 1000),
        "bf16": torch.randn(500, 31).to(torch.bfloat16),
        "f16": torch.randn(999).half(),
        "i64": torch.randint(-(2**62), 2**62, (321,)),
        "bool": torch.rand(777) > 0.5,
        "fp8": torch.randn(640).to(torch.float8_e4m3fn),
        "complex": torch.randn(50, 3, dtype=torch.complex64),
        "zeros": torch.zeros(2_000_000),
        "scalar": torch.tensor(3, dtype=torch.int32),
        "empty": torch.empty(0, 5),
        "nan": torch.full((200,), float("nan")),
    }
    if isinstance(compression, list):
        compression = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "gzip", "configuration": {"level": 1}},
        ]
        state = {key: state[key] for key in ("f32", "i64", "zeros")}
    with ac.Checkpointer(tmp_path, state, compression=compression) as ckpt:
        ckpt.save(0).result(timeout=60)
        loaded = ckpt.load(0)
        assert ckpt.verify(0).ok
    for key, tensor in state.items():
        assert loaded[key].dtype == tensor.dtype
        assert loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_state_larger_than_the_memory_limit_streams_through(tmp_path: Path, writer: ac.Writer) -> None:
    state = {f"t{index}": torch.full((100_000,), float(index)) for index in range(20)}
    limit = 2_000_000
    with ac.Checkpointer(tmp_path, state, staging=ac.Staging(memory_limit=limit), writer=writer) as ckpt:
        info = ckpt.save(1).result(timeout=60)
        loaded = ckpt.load(1)
    assert info.raw_bytes == 20 * 400_000 > limit
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_ten_thousand_small_tensors(tmp_path: Path) -> None:
    state = {"t": [torch.full((256,), float(index)) for index in range(10_000)]}
    with ac.Checkpointer(tmp_path, state, keep=ac.Keep(last=1)) as ckpt:
        info = ckpt.save(1).result(timeout=100)
        loaded = ckpt.load(1)["t"]
    assert info.num_arrays == 10_000
    assert all(torch.equal(one, other) for one, other in zip(loaded, state["t"], strict=True))


def test_many_saves_reuse_the_memory_and_keep_the_last_three(tmp_path: Path, writer: ac.Writer) -> None:
    training = Training()
    with ac.Checkpointer(tmp_path, training.state, writer=writer) as ckpt:
        for step in range(10):
            training.train(1)
            ckpt.save(step)
        ckpt.wait(timeout=60)
        statistics = ckpt.statistics()
    with ac.Checkpointer(tmp_path, training.state, writer=writer) as ckpt:
        assert [info.step for info in ckpt.checkpoints()] == [7, 8, 9]
        assert ckpt.latest is not None
        assert ckpt.latest.step == 9
    assert (statistics.num_saves, statistics.num_durable) == (10, 10)
    assert statistics.last is not None
    assert statistics.last.stored_bytes > 0


def test_step_saves_when_the_policy_says_so(tmp_path: Path, writer: ac.Writer) -> None:
    training = Training()
    with ac.Checkpointer(tmp_path, training.state, when=ac.Every(steps=3), writer=writer) as ckpt:
        saved = [step for step in range(10) if ckpt.step(step, metrics={"loss": 1.0}) is not None]
    assert saved == [3, 6, 9]


def test_stats_and_progress_are_filled_in(tmp_path: Path) -> None:
    state = {"w": torch.randn(3_000_000)}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        saving = ckpt.save(1)
        info = saving.result(timeout=60)
    stats = saving.stats
    assert saving.staged
    assert saving.progress == 1.0
    assert saving.outcome == "durable"
    assert stats.raw_bytes == info.raw_bytes == 12_000_000
    assert 0 < stats.stored_bytes == info.stored_bytes
    assert 0 < stats.blocked_s <= stats.durable_s
    assert 0 < stats.stage_s <= stats.durable_s
    assert min(stats.encode_s, stats.write_s, stats.commit_s) > 0
    on_disk = sum(path.stat().st_size for path in Path(info.path).rglob("*") if path.is_file())
    assert on_disk == info.stored_bytes + (Path(info.path) / "zarr.json").stat().st_size


def test_events_tell_the_story_of_a_save(tmp_path: Path, writer: ac.Writer) -> None:
    names: list[tuple[str, int | None]] = []
    state = {"w": torch.ones(3)}
    with ac.Checkpointer(
        tmp_path,
        state,
        writer=writer,
        keep=ac.Keep(last=1),
        on_event=lambda event: names.append((event.name, event.step)),
    ) as ckpt:
        for step in (1, 2):
            ckpt.save(step).result(timeout=60)
    assert [name for name in names if name[0] == "save.durable"] == [("save.durable", 1), ("save.durable", 2)]
    assert ("checkpoint.pruned", 1) in names


# -- busy ----------------------------------------------------------------------------------------


class PausedWriter:
    """A checkpointer whose writer process is stopped, so that saves stay pending until `resume`."""

    def __init__(self, ckpt: ac.Checkpointer) -> None:
        self.pid = ckpt.health().writer_pid
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def test_busy_skip_leaves_the_outcome_on_the_future(tmp_path: Path) -> None:
    state = {"w": torch.ones(1000)}
    with ac.Checkpointer(tmp_path, state, staging=ac.Staging(when_busy="skip")) as ckpt:
        paused = PausedWriter(ckpt)
        first = ckpt.save(1)
        second = ckpt.save(2)
        assert second.outcome == "skipped"
        with pytest.raises(ac.SaveSkippedError, match="step 2"):
            second.result()
        paused.resume()
        first.result(timeout=60)
        ckpt.save(2).result(timeout=60)
        assert ckpt.statistics().num_skipped == 1


def test_busy_wait_blocks_until_the_slot_is_free(tmp_path: Path) -> None:
    state = {"w": torch.ones(1000)}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        paused = PausedWriter(ckpt)
        first = ckpt.save(1)
        resumer = threading.Thread(target=paused.resume)
        resumer.start()
        second = ckpt.save(2)
        resumer.join()
        assert first.outcome == "durable"
        second.result(timeout=60)


def test_busy_supersede_replaces_the_newest_save_not_yet_begun(tmp_path: Path) -> None:
    state = {"w": torch.zeros(8_000_000)}
    with ac.Checkpointer(
        tmp_path, state, staging=ac.Staging(slots=2, when_busy="supersede"), compression="small"
    ) as ckpt:
        first = ckpt.save(1)
        second = ckpt.save(2)
        third = ckpt.save(3)
        ckpt.wait(timeout=60)
        assert third.outcome == "durable"
        assert first.outcome == "durable"
        # The writer may have begun the second before the third came; it is never half of both.
        assert second.outcome in {"superseded", "durable"}
        assert [info.step for info in ckpt.checkpoints()] == [1] + ([2] if second.outcome == "durable" else []) + [3]


def test_cancelled_save_leaves_nothing_behind(tmp_path: Path) -> None:
    state = {"w": torch.ones(1000)}
    with ac.Checkpointer(tmp_path, state) as ckpt:
        with hand_overs_held(ckpt):
            saving = ckpt.save(1)
            assert saving.cancel()
        assert saving.outcome == "cancelled"
        ckpt.save(1).result(timeout=60)
        assert ckpt.statistics().num_cancelled == 1


# -- closing, awaiting ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_await_and_async_with(tmp_path: Path, writer: ac.Writer, backend: str) -> None:
    async def main() -> int:
        async with ac.Checkpointer(tmp_path, {"w": torch.ones(10)}, writer=writer) as ckpt:
            info = await ckpt.save(1)
            ckpt.save(2)
            await ckpt.drain()
            assert [found.step for found in ckpt.checkpoints()] == [1, 2]
        return info.step

    assert run_async(backend, main) == 1


def run_async(backend: str, main: Callable[[], Any]) -> Any:
    import anyio

    return anyio.run(main, backend=backend)


def test_close_is_idempotent_and_ends_everything(tmp_path: Path) -> None:
    ckpt = ac.Checkpointer(tmp_path, {"w": torch.ones(10)})
    pid = ckpt.health().writer_pid
    saving = ckpt.save(1)
    ckpt.close()
    ckpt.close()
    assert saving.outcome == "durable"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    for use in (lambda: ckpt.save(2), lambda: ckpt.step(2), lambda: ckpt.restore(), lambda: ckpt.delete(1)):
        with pytest.raises(ac.ClosedError):
            use()


def test_close_with_a_timeout_says_what_is_outstanding_and_may_be_repeated(tmp_path: Path) -> None:
    ckpt = ac.Checkpointer(tmp_path, {"w": torch.ones(10)})
    paused = PausedWriter(ckpt)
    ckpt.save(7)
    with pytest.raises(TimeoutError, match=r"\[7\]"):
        ckpt.close(timeout=0.05)
    paused.resume()
    ckpt.close(timeout=60)
    assert [info.step for info in ac.open(tmp_path).checkpoints()] == [7]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restore_decodes_in_the_memory_that_saves_then_use(tmp_path: Path, kind: Any) -> None:
    writer = ac.Writer(kind=kind)
    with ac.Checkpointer(tmp_path, {"w": torch.arange(10**6)}, writer=writer) as ckpt:
        ckpt.save(1).result(60)
    state = {"w": torch.zeros(10**6, dtype=torch.int64), "counter": torch.tensor(0)}
    with ac.Checkpointer(tmp_path, state, writer=writer) as ckpt:
        ckpt.restore(strict=False)
        assert torch.equal(state["w"], torch.arange(10**6))
        state["counter"] += 1
        saved = [ckpt.save(step) for step in (2, 3)]
        for step, saving in enumerate(saved, start=2):
            saving.result(60)
            loaded = ckpt.load(step)
            assert torch.equal(loaded["w"], torch.arange(10**6))
            assert loaded["counter"] == 1
        state["w"].zero_()
        ckpt.restore(3)
        assert torch.equal(state["w"], torch.arange(10**6))
