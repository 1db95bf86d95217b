"""One life of a trainer that is told to stop: restore, check, train with DataLoader workers, leave on `preempted`."""

from __future__ import annotations

import logging
import os
import signal
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import torch
from content import Content
from journal import Journal
from torch.utils.data import DataLoader, TensorDataset

import asyncckpt as ac

__all__ = ["GRACE_S", "SAVE_EVERY", "live"]

GRACE_S = 15.0
SAVE_EVERY = 3
NUM_WORKERS = 4


def _ignore_sigterm(worker: int) -> None:
    # A signal to the group would end the workers first, and the loop with an exception of the DataLoader.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def live(root: Path, journal: Journal, content: Content) -> NoReturn:
    """Be the trainer, in a process that was just forked and leads a group of its own; never returns."""
    os.setpgid(0, 0)
    code = 1
    try:
        logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")  # more workers than cores
        _train(root, journal, content)
        code = 0
    except RuntimeError as error:
        # A worker that was signalled before it could ignore the signal; torch ends the loop for it.
        is_worker = "DataLoader worker" in str(error)
        journal.note("bereaved" if is_worker else "error", 0, traceback.format_exc())
        code = 0 if is_worker else 1
    except BaseException:
        journal.note("error", 0, traceback.format_exc())
    finally:
        os._exit(code)


def _train(root: Path, journal: Journal, content: Content) -> None:
    state = content.make()
    options = ac.Preemption(grace=GRACE_S)
    with ac.Checkpointer(root, state, when=ac.Every(steps=SAVE_EVERY), preemption=options) as ckpt:
        journal.note("opened", 0)
        found = ckpt.restore()
        step = -1 if found is None else found.step
        journal.note("restored", step, " ".join([] if found is None else content.differences(state, step)))
        data = DataLoader(TensorDataset(torch.arange(10**6)), num_workers=NUM_WORKERS, worker_init_fn=_ignore_sigterm)
        for _batch in data:
            step += 1
            content.fill(state, step)
            journal.note("trained", step)
            ckpt.step(step)
            if ckpt.preempted:
                journal.note("stopped", step)
                break
        del data
    journal.note("closed", step)
