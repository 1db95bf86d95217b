"""One life of a trainer that is told to stop: restore, train with DataLoader workers, leave on `preempted`."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from content import Content
from journal import Journal
from torch.utils.data import DataLoader, TensorDataset

import asyncckpt as ac

__all__ = ["NUM_WORKERS", "Fills", "Life", "Task", "live", "shield", "train"]

NUM_WORKERS = 4
_JOURNALLED = ("save.started", "save.staged", "save.durable")


@dataclass(frozen=True, slots=True)
class Life:
    """What the driver has decided about one life.

    Attributes:
        moment: when the signal is to come: ``start``, ``restore``, ``step`` or ``save``.
        is_twice: it comes a second time, soon after.
        leaves_now: a repeated signal means that at once, see ``Preemption.repeat_s``.
        to_group: it comes to the workers as well.
        save_every: steps.
        grace_s: until the process should be gone.
        is_fork_shielded: workers cannot be hit before they ignore the signal.
    """

    moment: str
    is_twice: bool
    leaves_now: bool
    to_group: bool
    save_every: int
    grace_s: float
    is_fork_shielded: bool = True

    @property
    def preemption(self) -> ac.Preemption:
        """As the checkpointer takes it."""
        return ac.Preemption(grace=self.grace_s, repeat_s=0.0 if self.leaves_now else self.grace_s)


class Task(Protocol):
    """What is trained."""

    @property
    def state(self) -> Any:
        """For the checkpointer."""

    def fingerprint(self, step: int) -> str:
        """Stands for every bit of the state, which is to be that of *step*."""

    def steps(self, first: int) -> Iterator[int]:
        """Trains; yields each step when it is complete."""


def shield(loader: DataLoader[Any], *, is_fork_shielded: bool) -> DataLoader[Any]:
    """Shield its workers from a signal to the group, which would end them first, and the loop with an exception."""
    if is_fork_shielded:
        return ac.shield_workers(loader)
    loader.worker_init_fn = ac.shield_worker  # which comes too late for some
    return loader


class Fills:
    """Follows from the step, and costs nothing: most lives can be of this kind."""

    def __init__(self, content: Content, *, num_workers: int = NUM_WORKERS, is_fork_shielded: bool = True) -> None:
        self._content = content
        self._num_workers = num_workers
        self._is_fork_shielded = is_fork_shielded
        self.state = content.make()

    def fingerprint(self, step: int) -> str:
        return " ".join(self._content.differences(self.state, step))

    def steps(self, first: int) -> Iterator[int]:
        numbers = TensorDataset(torch.arange(10**6))
        data = shield(DataLoader(numbers, num_workers=self._num_workers), is_fork_shielded=self._is_fork_shielded)
        for step, _batch in enumerate(data, first):
            self._content.fill(self.state, step)
            yield step


def live(make_task: Callable[[], Task], life: Life, root: Path, journal: Journal) -> NoReturn:
    """Be the trainer, in a process that was just forked and leads a group of its own; never returns."""
    os.setpgid(0, 0)
    code = 1
    try:
        logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")  # more workers than cores
        train(make_task(), life, root, journal)
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


def train(task: Task, life: Life, root: Path, journal: Journal) -> None:
    """Restore and train until told to stop, and journal all of it."""

    def tell(event: ac.Event) -> None:
        if event.name in _JOURNALLED and event.step is not None:
            journal.note(event.name, event.step)

    when = ac.Every(steps=life.save_every)
    with ac.Checkpointer(root, task.state, when=when, preemption=life.preemption, on_event=tell) as ckpt:
        journal.note("opened", ckpt.health().writer_pid)
        found = ckpt.restore()
        last = -1 if found is None else found.step
        journal.note("restored", last, "" if found is None else task.fingerprint(last))
        for step in task.steps(last + 1):
            journal.note("trained", step, task.fingerprint(step))
            ckpt.step(step)
            if ckpt.preempted:
                journal.note("stopped", step)
                break
    journal.note("closed", 0)
