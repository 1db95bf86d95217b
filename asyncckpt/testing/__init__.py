"""For tests of stores, and of what is built on checkpoints; ``docs/testing.md`` shows how.

* `StoreSuite`: what every store must do, as a class of pytest tests.
* `FaultStore`: a decorator that fails, waits or dies at chosen calls.
* `SlowStore`: a decorator that lets bytes through at a limited rate.
* `every_crash_point`, `every_error_point`: run something once per place where it can be interrupted.
* `kill_writer`: SIGKILL for the writer of a live checkpointer.

Only `StoreSuite` needs pytest, and is imported when it is first used. ``import asyncckpt`` imports none of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncckpt.testing.crash_points import FaultPoint, every_crash_point, every_error_point
from asyncckpt.testing.fault_store import FaultStore
from asyncckpt.testing.faults import Call, Fault, Gate, SimulatedCrash
from asyncckpt.testing.raw import RawAccess, RawDirectory, RawFiles
from asyncckpt.testing.slow_store import SlowStore
from asyncckpt.testing.writer import kill_writer

if TYPE_CHECKING:
    from asyncckpt.testing.suite import StoreSuite

__all__ = [
    "Call",
    "Fault",
    "FaultPoint",
    "FaultStore",
    "Gate",
    "RawAccess",
    "RawDirectory",
    "RawFiles",
    "SimulatedCrash",
    "SlowStore",
    "StoreSuite",
    "every_crash_point",
    "every_error_point",
    "kill_writer",
]


def __getattr__(name: str) -> Any:
    if name != "StoreSuite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # Before the first import, or a failing assertion of the suite would not show what it compared.
    pytest.register_assert_rewrite(f"{__name__}.suite")
    from asyncckpt.testing.suite import StoreSuite

    globals()[name] = StoreSuite
    return StoreSuite
