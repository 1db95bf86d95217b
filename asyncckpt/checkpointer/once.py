"""Saving without a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from asyncckpt.checkpointer.checkpointer import Checkpointer
from asyncckpt.model import CheckpointInfo
from asyncckpt.options import Writer
from asyncckpt.policies.keep import Keep

__all__ = ["save_sync"]


def save_sync(
    root: str | PathLike[str], step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
) -> CheckpointInfo:
    """Save once and return when it is durable, for scripts without a training loop.

    Args:
        root: directory of the run; every checkpoint in it is kept.
        step: see `Checkpointer.save`, also for the rest.
        state: what to save.
        metrics: numbers recorded with the checkpoint.
    """
    with Checkpointer(root, state, keep=Keep(last=None), writer=Writer(kind="thread"), preemption=None) as checkpointer:
        return checkpointer.save(step, metrics=metrics).result()
