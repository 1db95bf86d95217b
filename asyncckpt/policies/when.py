"""When to save: small frozen values, joined by ``|``, that decide from a `Moment` alone.

Nothing here reads a clock or remembers anything; the caller passes where counting starts, and moves it
whenever it saves or restores. So one rank can decide for all, and a decision can be told, and repeated.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from asyncckpt.errors import InvalidOptionError
from asyncckpt.model import IntervalReport, Kind
from asyncckpt.policies.checks import require_count, require_duration
from asyncckpt.policies.moment import Moment

__all__ = ["AnyOf", "AtSteps", "Every", "When", "decide"]

_PRECEDENCE: tuple[Kind, ...] = ("best", "validation", "regular")


class When(abc.ABC):
    """Base of all policies; subclass it for one of your own. ``a | b`` is due when either is.

    Only `due` must be written. Make it a frozen value: what it must remember is in the `Moment`.
    """

    __slots__ = ()

    @abc.abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether to save after the training step that `Checkpointer.step` was just told of."""

    def due_validated(self, moment: Moment) -> bool:
        """Whether to save because `Checkpointer.validated` was called; ``moment.validation`` has the metrics."""
        return False

    @property
    def kind(self) -> Kind:
        """What a checkpoint saved because of this policy is called."""
        return "regular"

    @property
    def members(self) -> tuple[When, ...]:
        """The policies it joins; of a simple one, itself."""
        return (self,)

    def explain(self, moment: Moment) -> IntervalReport | None:
        """What it decides and why, where the interval is not plain to see from its fields."""
        return None

    def __or__(self, other: When) -> AnyOf:
        if not isinstance(other, When):
            return NotImplemented
        return AnyOf(self.members + other.members)


def decide(when: When, moment: Moment) -> Kind | None:
    """The kind of checkpoint to save at *moment*; ``None``: none is due.

    When several policies are due, ``"best"`` goes before ``"validation"`` and that before ``"regular"``.
    """
    asked_by_validation = moment.validation is not None
    due = {
        policy.kind
        for policy in when.members
        if (policy.due_validated(moment) if asked_by_validation else policy.due(moment))
    }
    return next((kind for kind in _PRECEDENCE if kind in due), next(iter(sorted(due)), None))


@dataclass(frozen=True, slots=True)
class AnyOf(When):
    """Due when any of *policies* is."""

    policies: tuple[When, ...]

    @property
    def members(self) -> tuple[When, ...]:
        return self.policies

    def due(self, moment: Moment) -> bool:
        return any(policy.due(moment) for policy in self.policies)

    def due_validated(self, moment: Moment) -> bool:
        return any(policy.due_validated(moment) for policy in self.policies)

    def explain(self, moment: Moment) -> IntervalReport | None:
        return next((report for policy in self.policies if (report := policy.explain(moment)) is not None), None)


@dataclass(frozen=True, slots=True)
class Every(When):
    """Due regularly, by steps, by time, or by whichever comes first.

    Steps are counted from 0, not from the last save: ``Every(steps=500)`` is due at 500, 1000, 1500
    also when something else saved at 620, so step numbers stay round. A loop that advances by more
    than one is due at the first step on or after each multiple. Step 0 is never due by steps: nothing
    was trained yet. A step below the last one (the loop was rewound by hand) counts from its own
    multiple, so saving goes on instead of waiting for the old step to come around again.

    Time is counted from the last save of any kind.

    Attributes:
        steps: every so many training steps, at least 1.
        seconds: every so many seconds.
        minutes: the same in minutes; give one of the two.
    """

    steps: int | None = None
    seconds: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None and self.minutes is None:
            raise InvalidOptionError("Every needs steps=, seconds= or minutes=")
        if self.seconds is not None and self.minutes is not None:
            raise InvalidOptionError("give Every either seconds= or minutes=, not both")
        if self.steps is not None:
            require_count("Every.steps", self.steps, 1)
        for name, value in (("seconds", self.seconds), ("minutes", self.minutes)):
            if value is not None:
                require_duration(f"Every.{name}", value)

    @property
    def interval_s(self) -> float | None:
        """The time between saves in seconds, if there is one."""
        return self.minutes * 60.0 if self.minutes is not None else self.seconds

    def due(self, moment: Moment) -> bool:
        if self.steps is not None and moment.step // self.steps != (moment.last_step or 0) // self.steps:
            return True
        return self.interval_s is not None and moment.now_s - moment.last_s >= self.interval_s


@dataclass(frozen=True, slots=True, init=False)
class AtSteps(When):
    """Due at these steps: ``AtSteps(100, 1_000, 10_000)``.

    A loop that jumps over one is due at the first step after it.

    Attributes:
        steps: in ascending order.
    """

    steps: tuple[int, ...]

    def __init__(self, *steps: int) -> None:
        if not steps:
            raise InvalidOptionError("AtSteps needs at least one step")
        for step in steps:
            require_count("AtSteps", step, 0)
        object.__setattr__(self, "steps", tuple(sorted(set(steps))))

    def due(self, moment: Moment) -> bool:
        after = -1 if moment.last_step is None else moment.last_step
        return any(after < due_step <= moment.step for due_step in self.steps)
