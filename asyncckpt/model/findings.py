"""What looking at a checkpoint found: damage, and what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncckpt.model.checkpoint import CheckpointInfo

__all__ = ["Damage", "Recovered", "VerifyReport"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file.

    Attributes:
        key: the file, relative to the step.
        reason: what is wrong with it.
        array: array whose values are lost with it, ``state/model/lm_head.weight``; empty when it holds none.
        tensors: paths in the state of the tensors over that array, ``model/lm_head.weight``, where the
            header tells; tied ones are several.
    """

    key: str
    reason: str
    array: str = ""
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``verify``.

    Attributes:
        step: the step.
        num_files: files it has; all of them were looked for, and have the right size if not in *damaged*.
        checked_bytes: how many bytes were read and compared with digests.
        damaged: what is wrong.
        deep: whether everything that was read was also decoded.
        sample: which fraction of the bytes was to be read; the other files may be damaged.
        seed: what chose the files of the sample.
    """

    step: int
    num_files: int
    checked_bytes: int
    damaged: tuple[Damage, ...]
    deep: bool = False
    sample: float = 1.0
    seed: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing that was looked at is damaged; with a *sample* that is not everything."""
        return not self.damaged


@dataclass(frozen=True, slots=True)
class Recovered:
    """What ``recover`` could salvage.

    Attributes:
        info: what the header says; None when it is damaged.
        state: what ``load`` would give, without what is lost: entries of dicts are left out, elements of lists
            and tuples are None. Without a header it is flat: arrays by key.
        lost: one entry per damaged file; ``Damage.tensors`` names what is missing from *state*.
    """

    info: CheckpointInfo | None
    state: dict[str, Any]
    lost: tuple[Damage, ...]
