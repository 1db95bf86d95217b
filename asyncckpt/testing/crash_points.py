"""Running something once per place where it can be interrupted."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from asyncckpt.errors import CheckpointError
from asyncckpt.stores.contract import Store
from asyncckpt.testing.fault_store import FaultStore
from asyncckpt.testing.faults import HALVED, Call, Fault, Moment, SimulatedCrash

__all__ = ["FaultPoint", "every_crash_point", "every_error_point"]

_StoreT = TypeVar("_StoreT", bound=Store)

Action = Callable[[Store], object]


@dataclass(frozen=True, slots=True)
class FaultPoint:
    """Where an action was interrupted, and how that ended.

    Attributes:
        number: of the call, from 1.
        call: the call.
        moment: when, relative to it; see `Fault`.
        raised: what the action raised; ``None`` when it went on as if nothing had happened.
    """

    number: int
    call: Call
    moment: Moment
    raised: BaseException | None

    def __str__(self) -> str:
        return f"{self.moment} call {self.number}, {self.call}"


def every_crash_point(
    make_store: Callable[[], _StoreT],
    action: Action,
    check: Callable[[_StoreT, FaultPoint], object],
) -> list[FaultPoint]:
    """Kill *action* before and after every call it makes to its store, and look at what is left.

    It runs once to count its calls; then once per moment of each call, on a fresh store: before, after,
    and for ``put``, ``write`` and ``delete`` halfway. An action that starts threads must make the same
    number of calls each time; in which order does not matter.

    Args:
        make_store: a new store each time, on which the action runs to its end when nobody interrupts it.
        action: gets the store, wrapped; whatever it prepared elsewhere must not be shared by two runs.
        check: gets the store as `make_store` made it, and where the action died. It raises when it
            finds something wrong; where is added to the exception as a note.

    Returns:
        All points, in order.

    Raises:
        Exception: what *check* raises, or what *action* raises other than the crash.
        AssertionError: the action makes no call, or not always the same number of them.
    """
    return _every_point(make_store, action, check, lambda number, moment: Fault(nth=number, crash=True, moment=moment))


def every_error_point(
    make_store: Callable[[], _StoreT],
    action: Action,
    check: Callable[[_StoreT, FaultPoint], object],
    *,
    error: int = errno.EIO,
    persistent: bool = False,
) -> list[FaultPoint]:
    """Let every call that *action* makes to its store fail once, and look at what is left.

    As `every_crash_point`, but the process lives on: the action may clean up, try again, or raise; what
    it raised is `FaultPoint.raised`. An error after a call is a lost answer: it was done.

    Args:
        make_store: as there.
        action: as there.
        check: as there.
        error: errno of the `StorageError` that the call raises.
        persistent: all later calls fail as well, as when a disk is gone.

    Returns:
        All points, in order.

    Raises:
        Exception: what *check* raises, or what *action* raises other than a `CheckpointError`.
        AssertionError: as there.
    """
    return _every_point(
        make_store,
        action,
        check,
        lambda number, moment: Fault(nth=number, error=error, moment=moment, persistent=persistent),
    )


def _every_point(
    make_store: Callable[[], _StoreT],
    action: Action,
    check: Callable[[_StoreT, FaultPoint], object],
    make_fault: Callable[[int, Moment], Fault],
) -> list[FaultPoint]:
    counted = FaultStore(make_store())
    action(counted)
    counted.release()
    if not counted.calls:
        raise AssertionError("the action makes no call of the store")
    return [
        _interrupt(make_store(), action, check, number, make_fault(number, moment))
        for number, call in enumerate(counted.calls, start=1)
        for moment in _moments(call)
    ]


def _moments(call: Call) -> Iterator[Moment]:
    yield "before"
    if call.name in HALVED:
        yield "halfway"
    yield "after"


def _interrupt(
    inner: _StoreT,
    action: Action,
    check: Callable[[_StoreT, FaultPoint], object],
    number: int,
    fault: Fault,
) -> FaultPoint:
    store = FaultStore(inner, [fault])
    try:
        raised = _run(action, store)
        if len(store.calls) < number:
            raise AssertionError("that call never came: the action is not the same each time") from raised
        point = FaultPoint(number, store.calls[number - 1], fault.moment, raised)
        check(inner, point)
    except BaseException as error:
        error.add_note(f"interrupted {fault.moment} call {number} of {[str(call) for call in store.calls]}")
        raise
    finally:
        store.release()
    return point


def _run(action: Action, store: FaultStore) -> BaseException | None:
    try:
        action(store)
    except (SimulatedCrash, CheckpointError) as error:
        return error
    return None
