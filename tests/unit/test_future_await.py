"""``await future`` in asyncio and trio; settled from another thread, as in real life."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
import trio

from asyncckpt.errors import SaveCancelledError, SaveSkippedError, StorageError
from asyncckpt.future import SaveFuture, SavePromise
from asyncckpt.model import CheckpointInfo

INFO = CheckpointInfo(
    step=7,
    path="/root/step-00000007",
    kind="regular",
    created=datetime(2025, 1, 1, tzinfo=UTC),
    raw_bytes=10,
    stored_bytes=5,
    num_arrays=1,
    world_size=1,
    format=1,
    nonce="n",
)


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def settle_when_awaited(settle: Callable[[], object]) -> None:
    """Call *settle* in a thread once every task of the loop is blocked, so somebody awaits the future."""
    await anyio.wait_all_tasks_blocked()
    threading.Thread(target=settle).start()


def test_await_returns_the_info(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)
        async with anyio.create_task_group() as group:
            group.start_soon(settle_when_awaited, lambda: promise.set_result(INFO))
            assert await promise.future is INFO

    anyio.run(main, backend=backend)


def test_await_of_a_settled_save(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)
        promise.set_result(INFO)
        assert await promise.future is INFO
        assert await promise.future is INFO

    anyio.run(main, backend=backend)


def test_await_raises_the_original_error_and_marks_it_seen(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)
        error = StorageError("disk full", errno=28)
        async with anyio.create_task_group() as group:
            group.start_soon(settle_when_awaited, lambda: promise.set_exception(error))
            with pytest.raises(StorageError) as caught:
                await promise.future
        assert caught.value is error
        assert promise.take_unseen_error() is None

    anyio.run(main, backend=backend)


def test_await_of_a_skipped_save_raises(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)
        promise.set_outcome("skipped", "busy")
        with pytest.raises(SaveSkippedError):
            await promise.future

    anyio.run(main, backend=backend)


def test_many_tasks_await_one_save(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)
        results: list[CheckpointInfo] = []

        async def wait() -> None:
            results.append(await promise.future)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(wait)
            await settle_when_awaited(lambda: promise.set_result(INFO))
        assert results == [INFO] * 3

    anyio.run(main, backend=backend)


def test_cancelling_the_task_leaves_the_save_alone(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)

        async def wait() -> None:
            await promise.future

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert promise.future.outcome == "pending"
        assert promise.future._wakes == []
        promise.set_result(INFO)
        assert await promise.future is INFO

    anyio.run(main, backend=backend)


def test_cancelling_the_save_ends_the_wait_not_the_task(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)
        async with anyio.create_task_group() as group:
            group.start_soon(settle_when_awaited, promise.future.cancel)
            with pytest.raises(SaveCancelledError):
                await promise.future

    anyio.run(main, backend=backend)


def test_settling_from_within_the_loop(backend: str) -> None:
    async def main() -> None:
        promise = SavePromise(7)

        async def settle() -> None:
            await anyio.wait_all_tasks_blocked()
            promise.set_result(INFO)

        async with anyio.create_task_group() as group:
            group.start_soon(settle)
            assert await promise.future is INFO

    anyio.run(main, backend=backend)


async def start_awaiting(future: SaveFuture) -> Generator[Any, Any, CheckpointInfo]:
    """Step ``await future`` up to where it waits, and leave it there."""
    awaiting = future.__await__()
    next(awaiting)
    return awaiting


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])
def test_a_loop_that_closed_meanwhile_does_not_hurt(run: Callable[[Any], Any]) -> None:
    promise = SavePromise(7)
    awaiting = run(lambda: start_awaiting(promise.future))
    calls: list[SaveFuture] = []
    promise.future.add_done_callback(calls.append)
    assert promise.set_result(INFO)
    assert calls == [promise.future]
    awaiting.close()


def test_both_loops_await_the_same_save() -> None:
    promise = SavePromise(7)
    waiting = threading.Barrier(3)
    results: list[CheckpointInfo] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(reach)
            results.append(await promise.future)

    async def reach() -> None:
        await anyio.wait_all_tasks_blocked()
        waiting.wait()

    threads = [
        threading.Thread(target=anyio.run, args=(main,), kwargs={"backend": name}) for name in ("asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    waiting.wait()
    promise.set_result(INFO)
    for thread in threads:
        thread.join()
    assert results == [INFO] * 2


def test_awaiting_outside_a_loop_says_so() -> None:
    with pytest.raises(RuntimeError, match="event loop"):
        next(SavePromise(7).future.__await__())


def test_asyncio_works_without_trio() -> None:
    code = """
import asyncio, sys, threading
from asyncckpt.future import SavePromise
async def main():
    promise = SavePromise(7)
    asyncio.get_running_loop().call_soon(promise.set_outcome, "skipped", "busy")
    try:
        await promise.future
    except Exception as error:
        print(type(error).__name__, "trio" in sys.modules)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SaveSkippedError", "False"]
