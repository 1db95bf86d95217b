"""The traced program: ``python program.py SCENARIO FLUSH ROOT MARKS``. Never imports torch.

It appends a line to the file MARKS (outside of what is modelled) at each moment that carries a
promise, above all ``ACK STEP NONCE`` exactly when the future of a save would resolve. The marks are
system calls, so the trace has them in order with everything else.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import random
import sys
from collections.abc import Callable
from datetime import UTC, datetime

import xxhash

from asyncckpt.format.header import FORMAT, Header, encode_header_file
from asyncckpt.format.index import FileRecord, encode_index
from asyncckpt.policies.keep import Keep
from asyncckpt.repository import (
    Catalog,
    StepWriter,
    clean_partials,
    execute_retention,
    plan_retention,
    prepare_root,
)
from asyncckpt.repository.names import header_key
from asyncckpt.repository.quarantine import quarantine_step
from asyncckpt.stores import LocalStore
from asyncckpt.stores.contract import Store

BIG_BYTES = 2**20 + 4096 + 5  # direct I/O, and a tail that is no whole block
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def files_of(step: int, nonce: str) -> dict[str, bytes]:
    """Payload of one step: every write of a step has contents of its own, so that stale bytes show."""
    noise = random.Random(f"{step} {nonce}")
    files = {
        "state/zarr.json": b"{}",
        "state/w/zarr.json": b'{"shape":[%d]}' % step,
        "state/w/c.0": noise.randbytes(9000),
        "index/zarr.json": b"{}",
    }
    return files | ({"state/big/c.0.0": noise.randbytes(BIG_BYTES)} if step % 2 == 0 else {})


def header_of(step: int, nonce: str, indexes: list) -> bytes:
    header = Header(
        format=FORMAT,
        step=step,
        kind="regular",
        nonce=nonce,
        run="run",
        created=f"2026-01-01T00:00:{step:02}+00:00",
        world_size=1,
        tags=[],
        metrics={"loss": 0.25},
        metadata={},
        versions={},
        tree={},
        inline={},
        arrays=2,
        raw_bytes=100,
        stored_bytes=50,
        indexes=indexes,
        timings={},
    )
    return encode_header_file(header)


def write_step(store: Store, step: int, nonce: str) -> None:
    """Save one step the way the writer does, up to the return of the commit."""
    writer = StepWriter.begin(store, step, nonce)
    records = []
    for key, data in files_of(step, nonce).items():
        if len(data) >= 2**20:
            with writer.create(key, len(data)) as sink:
                sink.write(data[:70_000])
                sink.write(data[70_000:])
        else:
            writer.put(key, data)
        digest = xxhash.xxh3_128_hexdigest(data)
        records.append(FileRecord(key, len(data), digest, digest))
    metadata, chunk, reference = encode_index(records)
    writer.put(f"{reference.key}/zarr.json", metadata)
    writer.put(f"{reference.key}/c.0", chunk)
    writer.commit(header_of(step, nonce, [reference]))


class KilledError(BaseException):
    """Stands for the writer being killed."""


class DyingStore(LocalStore):
    """Kills the writer after the rename, before it is durable."""

    def sync_directory(self, prefix: str) -> None:
        if prefix == "":
            raise KilledError
        super().sync_directory(prefix)


class Session:
    """One run on one store, and its marks.

    Planted bugs reach `acknowledge` and `prune` through ``builtins``, to do them too early.
    """

    def __init__(self, marks: str) -> None:
        self._marks = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._current = (0, "")
        self.store: LocalStore
        vars(builtins).update(acknowledge=self.acknowledge, prune=lambda: self.prune(1))

    def mark(self, *words: object) -> None:
        os.write(self._marks, (" ".join(map(str, words)) + "\n").encode())

    def open(self, root: str, flush: str) -> None:
        self.store = LocalStore(prepare_root(root).root, flush=flush)
        self.mark("PREPARED")

    def save(self, step: int, nonce: str, write: Callable[[Store, int, str], None] = write_step) -> None:
        self._current = (step, nonce)
        self.mark("SAVING", step, nonce)
        write(self.store, step, nonce)
        self.acknowledge()

    def acknowledge(self) -> None:
        self.mark("ACK", *self._current)

    def prune(self, last: int) -> None:
        plan = plan_retention([step.info for step in Catalog(self.store).committed()], Keep(last=last), NOW)
        steps = [decision.step for decision in plan.remove]
        self.mark("REMOVING", *steps)
        execute_retention(self.store, plan)
        self.mark("REMOVED", *steps)


def direct(session: Session, root: str, flush: str) -> None:
    """A new root below new directories: saves, an abandoned save, retention, a damaged step set aside."""
    session.open(root, flush)
    store = session.store
    session.save(1, "first")
    session.save(2, "second")
    abandoned = StepWriter.begin(store, 3, "abandoned")
    abandoned.put("state/w/c.0", b"never finished")
    abandoned.abort()
    session.save(3, "third")
    session.prune(last=2)
    session.save(4, "fourth")
    session.mark("DAMAGING", 4)
    fd = os.open(f"{store.root}/step-00000004/state/w/c.0", os.O_WRONLY)
    os.pwrite(fd, b"damage", 4096)
    os.close(fd)
    session.mark("QUARANTINING", 4)
    quarantine_step(store, 4)
    session.mark("QUARANTINED", 4)
    session.save(4, "fourth-again")
    session.prune(last=1)
    # A deletion that was killed after its first half, and the same number saved again over what it left.
    session.save(5, "fifth")
    if 4 in Catalog(store).steps():  # unless a planted bug has removed it
        session.mark("REMOVING", 4)
        store.delete(header_key(4))
        store.sync_directory("step-00000004")
        session.mark("REMOVED", 4)
    session.save(4, "fourth-anew")
    # A writer killed after the rename; the next run sees its step, counts on it, and removes all others.
    with contextlib.suppress(KilledError):
        write_step(DyingStore(root, flush=flush), 6, "sixth")
    session.mark("VISIBLE", 6, "sixth")
    session.open(root, flush)
    clean_partials(session.store)
    session.prune(last=1)


SCENARIOS: dict[str, Callable[[Session, str, str], None]] = {"direct": direct}


def main() -> None:
    scenario, flush, root, marks = sys.argv[1:]
    if scenario == "pipeline":
        from program_pipeline import pipeline as run
    else:
        run = SCENARIOS[scenario]
    run(Session(marks), root, flush)


if __name__ == "__main__":
    main()
