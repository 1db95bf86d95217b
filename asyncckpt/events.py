"""What happens to saves and checkpoints, told to the user's ``on_event`` callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["Event", "EventCallback", "EventDispatcher"]

_LOGGER = logging.getLogger("asyncckpt")
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        name: what, such as ``"save.durable"``.
        step: the training step it is about, if any.
        time: when, in seconds since the epoch.
        fields: details, JSON values only.
    """

    name: str
    step: int | None = None
    time: float = field(default_factory=time.time)
    fields: Mapping[str, Any] = field(default_factory=lambda: _NO_FIELDS)


EventCallback = Callable[[Event], object]


class EventDispatcher:
    """Calls the callbacks, in order, in the thread where the event happens.

    A callback is a guest in the training loop or in the thread that talks to the writer: it should
    be quick, and whatever it raises is logged and goes no further.
    """

    def __init__(self, *callbacks: EventCallback) -> None:
        self._callbacks = callbacks

    def emit(self, name: str, step: int | None = None, /, **fields: Any) -> None:
        """Tell every callback; costs next to nothing when there is none."""
        if not self._callbacks:
            return
        event = Event(name, step, fields=MappingProxyType(fields))
        for callback in self._callbacks:
            try:
                callback(event)
            except KeyboardInterrupt:
                raise
            except BaseException:
                # SystemExit or a CancelledError must not end the thread that serves the writer.
                _LOGGER.exception("an on_event callback failed on %r", event)

    def __repr__(self) -> str:
        return f"<EventDispatcher of {len(self._callbacks)} callbacks>"
