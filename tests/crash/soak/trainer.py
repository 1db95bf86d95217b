"""One life of a trainer: restore, check, save without a pause until somebody ends it."""

from __future__ import annotations

import logging
import os
import random
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from content import Content
from journal import Journal

import asyncckpt as ac

__all__ = ["Life", "live"]

CLOSE_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True, slots=True)
class Life:
    """The options of one life.

    Attributes:
        slots: see `asyncckpt.Staging`.
        memory_limit: makes the saves stream through less memory than the state needs.
        compression: see `asyncckpt.Checkpointer`.
    """

    slots: int
    memory_limit: int | None
    compression: str

    @classmethod
    def draw(cls, rng: random.Random) -> Life:
        slots = rng.choice((1, 2, 3))
        memory_limit = slots * 9_600_000 if rng.random() < 0.25 else None
        return cls(slots, memory_limit, rng.choice(("fast", "none")))


def live(life: Life, root: Path, journal: Journal, content: Content) -> NoReturn:
    """Be the trainer, in a process that was just forked; never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)  # hundreds of replaced writers
        _train(life, root, journal, content)
        code = 0
    except BaseException:
        journal.note("error", 0, traceback.format_exc())
    finally:
        os._exit(code)


def _train(life: Life, root: Path, journal: Journal, content: Content) -> None:
    driver = os.getppid()
    stop = []
    signal.signal(CLOSE_SIGNAL, lambda *_: stop.append(True))
    state = content.make()
    with ac.Checkpointer(
        root,
        state,
        keep=ac.Keep(last=3),
        compression=life.compression,  # type: ignore[arg-type]
        staging=ac.Staging(slots=life.slots, memory_limit=life.memory_limit),
    ) as ckpt:
        journal.note("opened", len(list((root / ".asyncckpt" / "partial").iterdir())))
        found = ckpt.restore()
        step = -1 if found is None else found.step
        differences = [] if found is None else content.differences(state, step)
        journal.note("restored", step, " ".join(differences))
        while not stop and os.getppid() == driver:
            step += 1
            _save(ckpt, step, state, journal, content)
    journal.note("closed", step)


def _save(ckpt: ac.Checkpointer, step: int, state: dict[str, object], journal: Journal, content: Content) -> None:
    def note_end(future: ac.SaveFuture) -> None:
        error = future.exception(0)
        journal.note("acked" if error is None else "failed", step, "" if error is None else repr(error))

    content.fill(state, step)
    saving = ckpt.save(step)
    saving.add_done_callback(note_end)
    try:
        saving.wait_staged()
    except ac.WriterDiedError:
        return  # it was streaming, and its snapshot went with the writer
    journal.note("staged", step)
