"""Saves and restores as OpenTelemetry spans; needs ``pip install 'asyncckpt[otel]'``.

Only the API is used: spans go to whatever tracer provider the program has set up, and nowhere without one.

A save is a span ``asyncckpt.save`` that begins with the call of ``save()``, inside the span that is current there,
and ends when the save does. Its children are made when their durations are known, one after the other:
``asyncckpt.stage`` until the writer has the snapshot, ``asyncckpt.write`` (which includes waiting for the save
before it) and ``asyncckpt.commit``. Times come from one clock reading and measured durations, so that a clock that is
set meanwhile bends no span.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from asyncckpt.events import Event

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Status, StatusCode, TracerProvider
except ImportError as error:
    message = "asyncckpt.telemetry.otel needs opentelemetry-api: pip install 'asyncckpt[otel]'"
    raise ImportError(message) from error

__all__ = ["OtelSpans"]

_PREFIX = "asyncckpt."


@dataclass(slots=True)
class _OpenSave:
    """A span that has not ended; times in seconds since the epoch."""

    span: Span
    started: float
    staged: float | None = None


class OtelSpans:
    """Makes spans of the events it is called with; give it as ``on_event=``.

    Args:
        tracer_provider: where spans go; None is the program's global one, which may be set later.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("asyncckpt", tracer_provider=tracer_provider)
        self._lock = threading.Lock()
        self._saves: dict[str, _OpenSave] = {}  # by nonce

    def __call__(self, event: Event) -> None:
        """Begin, continue or end a span."""
        match event.name:
            case "save.started":
                self._start(event)
            case "save.staged":
                self._note_staged(event)
            case "save.durable" | "save.failed" | "save.skipped" | "save.superseded" | "save.cancelled":
                self._end(event)
            case "restore.done":
                self._add_restore(event)
            case "restore.failed":
                self._add_failed_restore(event)
            case "writer.restarted" | "writer.failed":
                self._note_writer(event)

    def _start(self, event: Event) -> None:
        attributes = _attributes(event, "kind", "blocked_s", "nonce")
        span = self._tracer.start_span(f"{_PREFIX}save", start_time=_ns(event.time), attributes=attributes)
        with self._lock:
            self._saves[event.fields["nonce"]] = _OpenSave(span, event.time)

    def _note_staged(self, event: Event) -> None:
        save = self._saves.get(event.fields["nonce"])
        if save is not None:
            save.staged = save.started + event.fields["stage_s"]
            self._add_child(save, "stage", save.started, save.staged, raw_bytes=event.fields["raw_bytes"])

    def _end(self, event: Event) -> None:
        with self._lock:
            save = self._saves.pop(event.fields["nonce"], None)
        if save is None:  # begun before this callback was there
            return
        outcome = event.name.removeprefix("save.")
        save.span.set_attribute(f"{_PREFIX}outcome", outcome)
        ended = save.started + event.fields["durable_s" if outcome == "durable" else "elapsed_s"]
        if outcome == "durable":
            self._add_writing(save, event, ended)
        elif outcome == "failed":
            if save.staged is not None:
                _fail(self._add_child(save, "write", save.staged, None), event).end(_ns(ended))
            _fail(save.span, event)
        save.span.end(_ns(ended))

    def _add_writing(self, save: _OpenSave, event: Event, ended: float) -> None:
        values = event.fields
        save.span.set_attributes(_attributes(event, "path", "raw_bytes", "stored_bytes", "linked_bytes"))
        staged = save.started if save.staged is None else save.staged
        commit = max(staged, ended - values["commit_s"])
        seconds = {"encode_s": values["encode_s"], "write_s": values["write_s"]}
        self._add_child(save, "write", staged, commit, **seconds)
        self._add_child(save, "commit", commit, ended)

    def _add_child(self, save: _OpenSave, name: str, start: float, end: float | None, **attributes: Any) -> Span:
        context = trace.set_span_in_context(save.span, Context())
        named = {f"{_PREFIX}{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(f"{_PREFIX}{name}", context, start_time=_ns(start), attributes=named)
        if end is not None:
            span.end(_ns(end))
        return span

    def _add_restore(self, event: Event) -> None:
        started = _ns(event.time - event.fields["restore_s"])
        attributes = _attributes(event, "raw_bytes", "fell_back_from")
        span = self._tracer.start_span(f"{_PREFIX}restore", start_time=started, attributes=attributes)
        span.end(_ns(event.time))

    def _add_failed_restore(self, event: Event) -> None:
        started = _ns(event.time - event.fields["restore_s"])
        span = self._tracer.start_span(f"{_PREFIX}restore", start_time=started)
        _fail(span, event).end(_ns(event.time))

    def _note_writer(self, event: Event) -> None:
        with self._lock:
            saves = list(self._saves.values())
        for save in saves:
            save.span.add_event(event.name, _attributes(event, *event.fields), _ns(event.time))

    def __repr__(self) -> str:
        return f"<OtelSpans {len(self._saves)} open>"


def _attributes(event: Event, *names: str) -> dict[str, Any]:
    step = {} if event.step is None else {f"{_PREFIX}step": event.step}
    return {**step, **{f"{_PREFIX}{name}": event.fields[name] for name in names}}


def _fail(span: Span, event: Event) -> Span:
    span.set_status(Status(StatusCode.ERROR, event.fields["message"]))
    span.set_attribute("error.type", event.fields["error"])
    return span


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
