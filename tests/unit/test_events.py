"""Events reach every callback, and nothing a callback raises comes back."""

from __future__ import annotations

import dataclasses
import logging
import threading

import pytest

from asyncckpt.events import Event, EventDispatcher


def test_callbacks_get_the_event_in_order() -> None:
    seen: list[tuple[str, Event]] = []
    events = EventDispatcher(lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event)))
    events.emit("save.durable", 7, path="/x")
    assert [name for name, _ in seen] == ["a", "b"]
    event = seen[0][1]
    assert (event.name, event.step, dict(event.fields)) == ("save.durable", 7, {"path": "/x"})
    assert event.time > 1e9
    assert seen[1][1] is event


def test_events_are_frozen() -> None:
    event = Event("save.durable", 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        event.fields["x"] = 1  # type: ignore[index]


def test_fields_may_be_called_name_and_step() -> None:
    seen: list[Event] = []
    EventDispatcher(seen.append).emit("x", None, name="n", step="s")
    assert dict(seen[0].fields) == {"name": "n", "step": "s"}


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(1)])
def test_failing_callbacks_are_logged_and_the_others_run(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event) -> None:
        raise error

    seen: list[Event] = []
    with caplog.at_level(logging.ERROR, logger="asyncckpt"):
        EventDispatcher(fail, seen.append).emit("save.failed", 7)
    assert [event.name for event in seen] == ["save.failed"]
    (record,) = caplog.records
    assert "save.failed" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_keyboard_interrupt_goes_through() -> None:
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EventDispatcher(interrupt).emit("x")


def test_keyboard_interrupt_of_a_callback_does_not_end_the_thread_that_serves_the_writer() -> None:
    ended: list[bool] = []

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    def serve() -> None:
        EventDispatcher(interrupt).emit("x")
        ended.append(True)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert ended == [True]


def test_without_callbacks_nothing_happens() -> None:
    events = EventDispatcher()
    events.emit("x", 1, y=2)
    assert repr(events) == "<EventDispatcher of 0 callbacks>"
