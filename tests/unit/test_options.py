"""Options are checked when they are built, and the message says what would be right."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import pytest

from asyncckpt.errors import InvalidOptionError, UsageError
from asyncckpt.options import Preemption, Staging, Writer


@pytest.mark.parametrize("options", [Preemption, Staging, Writer])
def test_defaults_are_valid_frozen_and_few(options: type[Any]) -> None:
    value = options()
    assert value == options()
    assert len(dataclasses.fields(options)) <= 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(options)[0].name, 3)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (Staging, {"snapshot": "later"}, "Staging.snapshot must be one of .*not 'later'"),
        (Staging, {"when_busy": "panic"}, "Staging.when_busy must be one of 'wait', 'skip', 'supersede', not 'panic'"),
        (Staging, {"slots": 0}, "Staging.slots must be at least 1, not 0"),
        (Staging, {"memory_limit": 0}, "Staging.memory_limit"),
        (Staging, {"threads": 0}, "Staging.threads"),
        (Writer, {"kind": "fiber"}, "Writer.kind must be one of 'process', 'thread', not 'fiber'"),
        (Writer, {"on_error": "ignore"}, "Writer.on_error"),
        (Writer, {"threads": 0}, "Writer.threads"),
        (Writer, {"nice": 20}, "Writer.nice must be 0 to 19, not 20"),
        (Writer, {"nice": -1}, "Writer.nice"),
        (Writer, {"restarts": -1}, "Writer.restarts"),
        (Writer, {"lock_timeout_s": -0.5}, "Writer.lock_timeout_s"),
        (Writer, {"incremental": 1}, "Writer.incremental must be a bool, not 1"),
        (Preemption, {"signals": (signal.SIGKILL,)}, "Preemption.signals: .*SIGKILL.* is no signal that can be"),
        (Preemption, {"signals": (0,)}, "Preemption.signals: 0 is no signal"),
        (Preemption, {"grace": 0}, "Preemption.grace must be positive, not 0"),
        (Preemption, {"signals": (), "grace": {}}, "Preemption.grace must be positive"),
        (Preemption, {"grace": {signal.SIGUSR1: 100.0}}, "Preemption.grace says nothing about SIGTERM"),
        (Preemption, {"repeat_s": -1}, "Preemption.repeat_s must not be negative"),
    ],
)
def test_bad_values_are_refused(options: type[Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message) as caught:
        options(**arguments)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (Staging, {"when_busy": "supersede", "slots": 3, "memory_limit": 1, "threads": 1}),
        (Writer, {"kind": "thread", "threads": 1, "nice": 19, "restarts": 0, "lock_timeout_s": 0, "on_error": "warn"}),
        (Writer, {"incremental": False}),
        (Preemption, {"signals": (), "grace": 0.1, "repeat_s": 0}),
    ],
)
def test_bounds_are_inclusive(options: type[Any], arguments: dict[str, Any]) -> None:
    value = options(**arguments)
    assert {name: getattr(value, name) for name in arguments} == arguments


def test_each_signal_may_have_its_own_grace() -> None:
    both = Preemption(signals=(signal.SIGTERM, signal.SIGUSR1), grace={signal.SIGTERM: 10.0, signal.SIGUSR1: 110.0})
    assert (both.grace_of(signal.SIGUSR1), both.grace_of(signal.SIGTERM)) == (110.0, 10.0)
    assert both.grace_of(None) == 10.0
    assert Preemption(grace=7.0).grace_of(signal.SIGTERM) == Preemption(grace=7.0).grace_of(None) == 7.0
