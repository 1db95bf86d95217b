"""The traced program, through the real writer pipeline: arena, encode threads, commit, retention.

Here the root was made by somebody else, a launcher script, who flushed nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator

import anyio
import msgspec
from program import NOW, DyingStore, KilledError, Session

from asyncckpt.memory import Arena
from asyncckpt.model import TensorSpec
from asyncckpt.policies.keep import Keep
from asyncckpt.repository import Catalog, plan_retention
from asyncckpt.stores.contract import Store
from asyncckpt.writer.messages import Save
from asyncckpt.writer.pipeline import Pipeline, Segment
from asyncckpt.writer.pruning import Pruner

SHAPES = {"big": (2**18 + 1025,), "frozen": (1500,), "w": (40, 50), "inline": (3,)}


def stage(step: int) -> tuple[Arena, list[TensorSpec]]:
    """A snapshot in an arena; the tensor ``frozen`` is the same in every step."""
    specs = []
    data = bytearray()
    for name, shape in SHAPES.items():
        specs.append(TensorSpec(f"state/{name}", "float32", shape, len(data)))
        size = 4
        for length in shape:
            size *= length
        data += random.Random(name if name == "frozen" else f"{name} {step}").randbytes(size)
    arena = Arena.create(len(data), shared=False)
    arena.buffer[: len(data)] = data
    return arena, specs


def save_message(step: int, nonce: str, tensors: msgspec.Raw) -> Save:
    empty = msgspec.Raw(b"{}")
    return Save(
        save_id=step,
        step=step,
        kind="regular",
        nonce=nonce,
        run="run",
        created=f"2026-01-01T00:00:{step:02}+00:00",
        tags=[],
        versions={},
        metrics=empty,
        metadata=empty,
        tree=empty,
        stage_s=0.0,
        arena_id=0,
        last=True,
        tensors=tensors,
    )


def write(store: Store, step: int, nonce: str) -> None:
    anyio.run(_write, Pipeline(store, "fast", 2), step, nonce)


async def _write(pipeline: Pipeline, step: int, nonce: str) -> None:
    arena, specs = stage(step)
    tensors = msgspec.Raw(msgspec.json.encode(specs))

    async def nothing(*_: object) -> None: ...

    async def segments() -> AsyncIterator[Segment]:
        yield Segment(tensors, arena.buffer, nothing)

    try:
        await pipeline.write(save_message(step, nonce, tensors), segments(), nothing)
    finally:
        arena.close()


def prune(session: Session, pruner: Pruner, keep: Keep) -> None:
    plan = plan_retention([step.info for step in Catalog(session.store).committed()], keep, NOW)
    steps = [decision.step for decision in plan.remove]
    session.mark("REMOVING", *steps)
    pruner.run(NOW)
    session.mark("REMOVED", *steps)


def pipeline(session: Session, root: str, flush: str) -> None:
    os.makedirs(root)
    session.open(root, flush)
    keep = Keep(last=1)
    pruner = Pruner(session.store, keep)
    session.save(1, "first", write)
    session.save(2, "second", write)
    prune(session, pruner, keep)
    # The writer is killed after the rename; the next one gets the same save again and finds it committed.
    try:
        write(DyingStore(root, flush=flush), 3, "third")
    except KilledError:
        session.save(3, "third", write)
    prune(session, pruner, keep)
