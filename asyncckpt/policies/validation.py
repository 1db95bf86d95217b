"""Saving what was just validated."""

from __future__ import annotations

from dataclasses import dataclass

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import Kind
from asyncckpt.policies.keep import Best, is_among_best
from asyncckpt.policies.moment import Moment
from asyncckpt.policies.when import When

__all__ = ["Validation"]


@dataclass(frozen=True, slots=True)
class Validation(When):
    """Due when `Checkpointer.validated` reports metrics: at every report, or when they are among the best.

    Attributes:
        best: save only what ranks among the best ``best.n`` of the checkpoints that exist or are being
            written, and call it ``"best"``. NaN never does, and a value that only equals the others does
            not. ``None`` saves at every validation, and calls it ``"validation"``.
    """

    best: Best | None = None

    def __post_init__(self) -> None:
        if self.best is not None and not isinstance(self.best, Best):
            raise InvalidOptionError(f"Validation.best must be a Best, not {self.best!r}")

    @property
    def kind(self) -> Kind:
        return "validation" if self.best is None else "best"

    def due(self, moment: Moment) -> bool:
        return False

    def due_validated(self, moment: Moment) -> bool:
        if moment.validation is None:
            return False
        return self.best is None or is_among_best(moment.validation, moment.saved, self.best)
