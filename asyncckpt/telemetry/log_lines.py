"""The lines that saves and restores leave in the log.

``step 500 staged 1.9 GB in 41 ms, blocked 12 ms`` and ``step 500 durable in 2.31 s, 812 MB/s, 1.31x``: the rate
is that of the raw bytes, the last number how many times smaller the files are. INFO on the logger ``asyncckpt``;
what is odd about a checkpoint that was saved is a WARNING.
Failures are logged where they become known: by the future as errors, by the writer's supervision as warnings.
"""

from __future__ import annotations

from asyncckpt.events import Event
from asyncckpt.logs import get_logger
from asyncckpt.telemetry.units import format_bytes, format_rate, format_ratio, format_seconds

__all__ = ["log_event", "log_line"]

_logger = get_logger("asyncckpt")


def log_event(event: Event) -> None:
    """Log *event*, if it is worth a line. An event callback."""
    line = log_line(event)
    if line is not None:
        _logger.info("%s", line)
    for warning in event.fields.get("warnings", ()):
        _logger.warning("step %s: %s", event.step, warning)


def log_line(event: Event) -> str | None:
    """The line of *event*, or None."""
    values, subject = event.fields, f"step {event.step}"
    match event.name:
        case "save.staged":
            size, took = format_bytes(values["raw_bytes"]), format_seconds(values["stage_s"])
            return f"{subject} staged {size} in {took}, blocked {format_seconds(values['blocked_s'])}"
        case "save.durable":
            raw_bytes, durable_s = values["raw_bytes"], values["durable_s"]
            rate, ratio = format_rate(raw_bytes, durable_s), format_ratio(raw_bytes, values["stored_bytes"])
            return f"{subject} durable in {format_seconds(durable_s)}, {rate}, {ratio}"
        case "save.skipped" | "save.superseded" | "save.cancelled":
            return f"{subject} {event.name.removeprefix('save.')}, not saved"
        case "restore.done":
            size, took = format_bytes(values["raw_bytes"]), format_seconds(values["restore_s"])
            return f"{subject} restored, {size} in {took}"
        case "checkpoint.pruned":
            return f"{subject} pruned: {values['reason']}"
        case "checkpoint.deleted":
            return f"{subject} deleted"
        case _:
            return None
