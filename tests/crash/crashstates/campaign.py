"""One recorded program, all its crash states, all checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crashstates.history import History, replay
from crashstates.image import Image
from crashstates.on_disk import disagreements
from crashstates.promises import Promises
from crashstates.states import Choice, Disk, choices
from crashstates.trace import read_trace

__all__ = ["Outcome", "explore", "load_history"]

_SAVE_EVERY = 50
_ON_DISK_EVERY = 25
_FRUITLESS = 20_000  # states in a row that were all known, more than the systematic ones: there are hardly any others


@dataclass(slots=True)
class Outcome:
    """Of one campaign.

    Attributes:
        num_states: different disks, by the digest of everything on them.
        num_checks: disks and moments: one disk is checked again where other promises hold.
        num_on_disk: how many were also built on a real file system.
        violations: what is broken, with the state that shows it.
    """

    num_calls: int
    num_moments: int
    num_states: int = 0
    num_checks: int = 0
    num_on_disk: int = 0
    violations: list[str] = field(default_factory=list)


def load_history(trace: Path) -> History:
    """What the program of *trace* did below the ``top`` beside it."""
    return replay(read_trace(trace), str(trace.parent / "top"), str(trace.parent / "marks"))


def explore(
    history: History, budget: int, *, seed: int = 0, stop_at_first: bool = False, scratch: Path | None = None
) -> Outcome:
    """Check up to *budget* different crash states of *history*; ends early when no new ones are found.

    Args:
        seed: of the order, and of the random states after the systematic ones.
        stop_at_first: return at the first state that breaks a promise.
        scratch: where a sample of the states is built on a real file system.
    """
    disk = Disk(history)
    promises = Promises(disk)
    outcome = Outcome(history.num_calls, len(history.moments))
    for choice, image in _distinct_states(disk, promises, seed, budget, outcome):
        found = promises.check(image, choice.moment, saves=outcome.num_checks % _SAVE_EVERY == 0)
        if scratch is not None and outcome.num_checks % _ON_DISK_EVERY == 0 and not image.has_aliases():
            outcome.num_on_disk += 1
            found += disagreements(image, scratch / str(outcome.num_checks))
        outcome.violations += [f"{violation} [{describe(history, choice)}]" for violation in found]
        if found and stop_at_first:
            break
    return outcome


def _distinct_states(
    disk: Disk, promises: Promises, seed: int, budget: int, outcome: Outcome
) -> Iterator[tuple[Choice, Image]]:
    """States that differ on the disk or in what was promised; *outcome* counts them."""
    states: set[str] = set()
    checked: set[tuple[str, int]] = set()
    fruitless = 0
    for choice in choices(disk, seed):
        image = disk.image(choice)
        identity = image.identity()
        check = (identity, promises.mark_at(choice.moment))
        fruitless = fruitless + 1 if check in checked else 0
        if len(states) >= budget or fruitless >= _FRUITLESS:
            return
        if check not in checked:
            states.add(identity)
            checked.add(check)
            outcome.num_states, outcome.num_checks = len(states), len(checked)
            yield choice, image


def describe(history: History, choice: Choice) -> str:
    """A state in words: after which mark, and what persisted."""
    mark = max((mark for mark in history.marks if mark.start <= choice.moment), key=lambda m: m.start, default=None)
    names = [
        f"{'+' if entry.inode is not None else '-'}{entry.name}"
        for entry in history.entries
        if entry.unit in choice.units and entry.start <= choice.moment
    ]
    after = "the start" if mark is None else " ".join(mark.words)
    return f"moment {choice.moment}, after {after}; persisted: {' '.join(names) or 'nothing'}; files {choice.files}"
