"""Looks at a root from outside, as a reader would, in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from content import Content
from procs import fork

import asyncckpt as ac

__all__ = ["Audit", "audit_root", "is_unlocked", "num_partials"]


@dataclass(frozen=True, slots=True)
class Audit:
    """What a reader found.

    Attributes:
        steps: committed and readable, oldest first.
        torn: what is wrong with any of them.
    """

    steps: list[int]
    torn: list[str]


def audit_root(root: Path, content: Content, *, everything: bool) -> Audit:
    """Verify every step on offer and compare the values of the newest one, or of all, with what they must be."""
    ours, theirs = os.pipe()
    child = fork(lambda: _audit_in_child(theirs, root, content, everything))
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return Audit(**json.loads(data)) if data else Audit([], ["the auditor died"])


def _audit_in_child(descriptor: int, root: Path, content: Content, everything: bool) -> NoReturn:
    try:
        torch.set_num_threads(1)
        try:
            result = _audit(root, content, everything)
        except Exception as error:
            result = Audit([], [f"auditor: {error!r}"])
        os.write(descriptor, json.dumps(asdict(result)).encode())
    finally:
        os._exit(0)


def _audit(root: Path, content: Content, everything: bool) -> Audit:
    if not root.exists():
        return Audit([], [])
    catalogue = ac.open(root)
    steps = [info.step for info in catalogue.checkpoints()]
    torn = [f"set aside: {path.name}" for path in (root / ".asyncckpt").glob("damaged/*")]
    for step in steps:
        try:
            torn += [f"step {step}: {damage.key}: {damage.reason}" for damage in catalogue.verify(step).damaged]
            if everything or step == steps[-1]:
                torn += [f"step {step}: {name} differs" for name in content.differences(catalogue.load(step), step)]
        except ac.CheckpointNotFoundError:
            continue  # retention took it meanwhile
        except ac.CorruptError as error:
            torn.append(f"step {step}: {error}")
    return Audit(steps, torn)


def num_partials(root: Path) -> int:
    """Unfinished steps, and steps without a header, lying in *root*."""
    partial = root / ".asyncckpt" / "partial"
    return len(list(partial.iterdir() if partial.exists() else ())) + sum(
        not (step / "zarr.json").exists() for step in root.glob("step-*")
    )


def is_unlocked(root: Path) -> bool:
    """Whether nobody holds the run lock."""
    path = root / ".asyncckpt" / "run.lock"
    if not path.exists():
        return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
