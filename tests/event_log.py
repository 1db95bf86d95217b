"""What a checkpointer told."""

from __future__ import annotations

import threading

from asyncckpt.events import Event

__all__ = ["EventLog"]

_TIMEOUT_S = 60.0


class EventLog:
    """Everything that was told, in order; also to be waited for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[Event] = []

    def __call__(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def steps(self, name: str) -> list[int | None]:
        with self._changed:
            return [event.step for event in self._events if event.name == name]

    def wait(self, name: str, step: int | None = None) -> Event:
        """The first of that name, and of *step* if one is given."""

        def find() -> Event | None:
            return next((told for told in self._events if told.name == name and step in (None, told.step)), None)

        with self._changed:
            assert self._changed.wait_for(find, _TIMEOUT_S), f"{name} of {step} is not among {self._events}"
            found = find()
            assert found is not None
            return found
