"""A real training run to be told to stop: the GPT-2 of the examples, its batches made by DataLoader workers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import train_gpt2
import xxhash
from told import NUM_WORKERS, shield
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_gpt2 import CONFIGS, TextLoader, Trainer

import asyncckpt as ac

__all__ = ["Gpt", "reference"]

_NUM_STEPS = 100_000  # of the schedule of learning rates
_CORPUS_BYTES = 2**20


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch by their position."""

    def __init__(self, loader: TextLoader) -> None:
        self._loader = loader

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        self._loader.position = position
        return TextLoader.__next__(self._loader)


class WorkersLoader(TextLoader):
    """The batches of `TextLoader` in the same order, made by worker processes."""

    def _start_epoch(self, epoch: int, position: int) -> None:
        super()._start_epoch(epoch, position)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    is_fork_shielded = True

    def _open(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=range(self.position, self.num_batches),
            num_workers=NUM_WORKERS,
            generator=torch.Generator(),  # else it draws a seed from the one that dropout draws from
        )
        return iter(shield(batches, is_fork_shielded=self.is_fork_shielded))

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == self.num_batches:
            self._start_epoch(self.epoch + 1, 0)
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self.position += 1
        return batch


class Gpt:
    """The trainer of the example at its smallest."""

    def __init__(self, *, has_workers: bool = True, is_fork_shielded: bool = True) -> None:
        torch.use_deterministic_algorithms(True)
        self._trainer = Trainer(CONFIGS["tiny"], steps=_NUM_STEPS, batch_size=2, seed=0, device="cpu")
        if has_workers:
            plain = self._trainer.loader
            loader = WorkersLoader(plain.text, plain.batch_size, plain.block_size, plain.seed)
            loader.is_fork_shielded = is_fork_shielded
            self._trainer.loader = loader
        self.state: ac.TrainingState = self._trainer.state()

    def fingerprint(self, step: int) -> str:
        """Of parameters, moments, schedule, random numbers and the position in the data."""
        trainer, digest = self._trainer, xxhash.xxh3_128()
        for parameter in trainer.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
            for _, value in sorted(trainer.optimizer.state[parameter].items()):
                digest.update(value.numpy().tobytes())
        digest.update(torch.get_rng_state().numpy().tobytes())
        place = step, trainer.loader.epoch, trainer.loader.position, trainer.scheduler.state_dict()["last_epoch"]
        return f"{digest.hexdigest()} {place}"

    def steps(self, first: int) -> Iterator[int]:
        for step in range(first, _NUM_STEPS):
            self._trainer.step()
            yield step


def reference(num_steps: int) -> Iterator[str]:
    """The fingerprints of a run that nobody interrupts, has no checkpointer and no workers."""
    task = Gpt(has_workers=False)
    for step in task.steps(0):
        if step == num_steps:
            return
        yield task.fingerprint(step)


def _short_corpus(max_bytes: int = _CORPUS_BYTES) -> Tensor:
    return _read_corpus(max_bytes)


_read_corpus = train_gpt2.read_corpus
train_gpt2.read_corpus = _short_corpus  # all of it takes longer to read than a life lasts
