"""What the marks of a program promise at each moment, and what every step must contain. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from crashstates.history import History, Mark
from crashstates.image import Content
from crashstates.states import Disk

__all__ = ["ROOT", "Expectations", "Written", "expectations", "written_steps"]

ROOT = "new/deeper/root"
"""Of the checkpoints, relative to the top directory."""


@dataclass(frozen=True, slots=True)
class Written:
    """One write of a step, as its program saw it in the end: the oracle."""

    step: int
    files: Mapping[str, Content]

    def equals(self, files: Mapping[str, Content]) -> bool:
        return self.files.keys() == files.keys() and all(
            files[key].digest == content.digest for key, content in self.files.items()
        )


@dataclass(frozen=True, slots=True)
class Expectations:
    """Promises that hold at one moment.

    Attributes:
        is_prepared: `prepare_root` has returned.
        acknowledged: nonce of each step that must be offered, complete.
        newest: of all acknowledged steps that nobody damaged; this one or a newer one must be offered,
            whatever retention is doing.
        gone: nonces that were removed or set aside, and must not be offered.
        damaged: nonces that were damaged on purpose: nobody expects them to verify.
        aside: nonces that are being, or were, set aside: nothing of them may be lost.
    """

    is_prepared: bool = False
    acknowledged: Mapping[int, str] = field(default_factory=dict)
    newest: int = 0
    gone: frozenset[str] = frozenset()
    damaged: frozenset[str] = frozenset()
    aside: frozenset[str] = frozenset()


def expectations(history: History) -> dict[int, Expectations]:
    """What holds from each mark on; the promises at any moment are those of the last mark before it."""
    found = {-1: Expectations()}
    latest: dict[int, str] = {}
    current = found[-1]
    for mark in history.marks:
        current = _after(current, mark, latest)
        found[mark.start] = current
    return found


def _after(before: Expectations, mark: Mark, latest: dict[int, str]) -> Expectations:
    verb, *words = mark.words
    steps = [int(word) for word in words if word.isdigit()]
    nonces = frozenset(latest[step] for step in steps if step in latest)
    without = {step: nonce for step, nonce in before.acknowledged.items() if step not in steps}
    match verb:
        case "PREPARED":
            return replace(before, is_prepared=True)
        case "ACK":
            latest[steps[0]] = words[1]
            acknowledged = {**without, steps[0]: words[1]}
            return replace(before, acknowledged=acknowledged, newest=max(acknowledged))
        case "REMOVING":
            return replace(before, acknowledged=without)
        case "REMOVED":
            return replace(before, gone=before.gone | nonces)
        case "DAMAGING":
            return replace(
                before, acknowledged=without, newest=max(without, default=0), damaged=before.damaged | nonces
            )
        case "QUARANTINING":
            return replace(before, aside=before.aside | nonces)
        case "QUARANTINED":
            return replace(before, gone=before.gone | nonces)
    return before


def written_steps(disk: Disk) -> dict[str, Written]:
    """Every step that its program saw, by nonce, with the bytes it wrote, taken from the system calls."""
    found: dict[str, Written] = {}
    for mark in disk.history.marks:
        if mark.words[0] in ("ACK", "VISIBLE") and mark.words[2] not in found:
            _, step, nonce = mark.words
            image = disk.image(disk.everything(mark.start))
            inode = image.find(f"{ROOT}/step-{int(step):08}")
            if inode is not None:
                found[nonce] = Written(int(step), image.tree(inode))
    return found
