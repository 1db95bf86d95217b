"""Which faults strike where. Pure."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tracing import Call

__all__ = ["FAULTS", "SCENARIOS", "Fault", "Point", "Scenario", "Strike", "plan_points", "plan_strikes"]

Scenario = Literal["fresh", "retention"]
SCENARIOS: tuple[Scenario, ...] = ("fresh", "retention")
"""A save into a root without steps, and one after which retention removes a step."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a system call.

    Attributes:
        name: for reports.
        code: the errno; None for SIGKILL, which strikes before the call is carried out.
        is_persistent: every later call of that name fails as well.
        stride: strikes only every *stride*-th point.
    """

    name: str
    code: int | None
    is_persistent: bool
    stride: int = 1

    def inject(self, point: Point) -> str:
        """The strace expression that makes it happen at *point*."""
        when = f"when={point.number}{'+' if self.is_persistent else ''}"
        what = "signal=SIGKILL" if self.code is None else f"error={errno.errorcode[self.code]}"
        return f"{point.call}:{what}:{when}"


FAULTS = (
    Fault("killed", None, is_persistent=False),
    *(
        Fault(f"{errno.errorcode[code]} {'for good' if is_persistent else 'once'}", code, is_persistent)
        for code in (errno.EIO, errno.ENOSPC, errno.EROFS)
        for is_persistent in (False, True)
    ),
    # To the code the same as ENOSPC; but few machines can mount a file system with quotas to see it there.
    Fault("EDQUOT for good", errno.EDQUOT, is_persistent=True, stride=16),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One occurrence of a durable system call in one save.

    Attributes:
        scenario: which save.
        call: name of the system call.
        number: how many of that name the writing thread has made by then, counted from 1.
        path: what it is about, as in `tracing.Call`.
        is_acknowledged: the save is durable by then; it is retention that calls.
    """

    scenario: Scenario
    call: str
    number: int
    path: str
    is_acknowledged: bool


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault at one point."""

    point: Point
    fault: Fault

    def __str__(self) -> str:
        point = self.point
        return f"{self.fault.name} at {point.call} {point.number} of {point.path} ({point.scenario})"


def plan_points(scenario: Scenario, calls: Sequence[Call]) -> list[Point]:
    """Every durable call among *calls*, the recording of an undisturbed save.

    Files are opened to be read, and directories to be listed; those calls change nothing and are left
    out, unless the directory is opened to be flushed.
    """
    # Retention flushes the same directories once more before it removes anything.
    acknowledged = min(index for index, call in enumerate(calls) if _is_last_flush(call))
    return [
        Point(scenario, call.name, call.number, call.path, index > acknowledged)
        for index, call in enumerate(calls)
        if call.name != "openat" or call.creates or _is_opened_to_flush(calls, index)
    ]


def _is_last_flush(call: Call) -> bool:
    return (call.name, call.path) == ("fsync", "/.asyncckpt/partial")


def _is_opened_to_flush(calls: Sequence[Call], index: int) -> bool:
    following = calls[index + 1] if index + 1 < len(calls) else None
    return following is not None and following.name == "fsync" and following.path == calls[index].path


def plan_strikes(points: Sequence[Point], sample: int) -> list[Strike]:
    """All faults at all *points*, or a fixed part of them.

    Args:
        points: where.
        sample: take every *sample*-th combination of one system call and one fault, and the first of
            each, so that none is left out; 1 takes all.
    """
    chosen = []
    for call in sorted({point.call for point in points}):
        of_call = [point for point in points if point.call == call]
        for offset, fault in enumerate(FAULTS):
            # Another phase for each fault, so that together they meet more points.
            first = offset * sample // len(FAULTS) % len(of_call)
            chosen += [Strike(point, fault) for point in of_call[first :: max(sample, fault.stride)]]
    return chosen
