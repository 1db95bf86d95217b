"""Notices that what is being trained does not change from save to save.

It happens when the loop trains a copy of the model (after ``deepcopy``, ``to``, a wrapper that clones, a second
construction) while the checkpointer holds the first one: every save succeeds, and none has learnt anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import xxhash

from asyncckpt.format.header import InlineTensor
from asyncckpt.format.index import FileRecord
from asyncckpt.writer.messages import Save

__all__ = ["TrainingWatch", "digest_of"]

# Saves that come for another reason than training having gone on: often right after another save.
_UNTRAINED_KINDS = frozenset({"emergency", "manual", "final"})


@dataclass(frozen=True, slots=True)
class _Seen:
    step: int
    digest: str


class TrainingWatch:
    """Compares each save with the one committed before it. A writer serves one run, and starts without a memory."""

    def __init__(self) -> None:
        self._last: _Seen | None = None

    def earlier_step(self, save: Save, digest: str | None) -> int | None:
        """The step before *save*, if all that is trained was the same in it.

        Args:
            save: a save of another step than the last one.
            digest: of what is trained, as `digest_of` has it.
        """
        last = self._last
        if last is None or digest is None or save.kind in _UNTRAINED_KINDS:
            return None
        is_same = last.digest == digest and last.step != save.step
        return last.step if is_same else None

    def remember(self, save: Save, digest: str | None) -> None:
        """*save* is committed."""
        self._last = None if digest is None else _Seen(save.step, digest)


def digest_of(
    trained: Collection[str], records: Iterable[FileRecord], inline: Mapping[str, InlineTensor]
) -> str | None:
    """One digest of the values of the arrays *trained*; None without any.

    Args:
        trained: array keys.
        records: files of the step.
        inline: tensors in its header.
    """
    if not trained:
        return None
    wanted = set(trained)
    values = {record.key: record.raw for record in records if record.key.rpartition("/")[0] in wanted}
    values.update((key, inline[key].data) for key in wanted & inline.keys())
    digest = xxhash.xxh3_128()
    for key in sorted(values):
        digest.update(f"{key} {values[key]}\n".encode())
    text: str = digest.hexdigest()
    return text
