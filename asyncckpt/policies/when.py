"""When to save: small frozen values, joined by ``|``, that decide from numbers alone.

Every policy answers `When.due`. Nothing here reads a clock or remembers anything; the caller passes
where counting starts, and moves it whenever it saves or restores.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from asyncckpt.errors import InvalidOptionError
from asyncckpt.policies.checks import require_count, require_duration

__all__ = ["AnyOf", "AtSteps", "Every", "When"]


class When(abc.ABC):
    """Base of all policies; subclass it for one of your own. ``a | b`` is due when either is."""

    __slots__ = ()

    @abc.abstractmethod
    def due(self, step: int, now_s: float, last_step: int | None, last_s: float) -> bool:
        """Whether to save after *step*.

        Args:
            step: the training step just completed.
            now_s: a monotonic clock (``time.monotonic()``), never the time of day, which jumps.
            last_step: step of the last save this run began or restored; ``None`` before there is one.
            last_s: *now_s* of that save or restore; before there is one, of the start of the run.
        """

    def __or__(self, other: When) -> AnyOf:
        if not isinstance(other, When):
            return NotImplemented
        return AnyOf(_members(self) + _members(other))


@dataclass(frozen=True, slots=True)
class AnyOf(When):
    """Due when any of *policies* is."""

    policies: tuple[When, ...]

    def due(self, step: int, now_s: float, last_step: int | None, last_s: float) -> bool:
        return any(policy.due(step, now_s, last_step, last_s) for policy in self.policies)


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

    def due(self, step: int, now_s: float, last_step: int | None, last_s: float) -> bool:
        if self.steps is not None and step // self.steps != (last_step or 0) // self.steps:
            return True
        return self.interval_s is not None and now_s - last_s >= self.interval_s


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

    def due(self, step: int, now_s: float, last_step: int | None, last_s: float) -> bool:
        after = -1 if last_step is None else last_step
        return any(after < due_step <= step for due_step in self.steps)


def _members(policy: When) -> tuple[When, ...]:
    return policy.policies if isinstance(policy, AnyOf) else (policy,)
