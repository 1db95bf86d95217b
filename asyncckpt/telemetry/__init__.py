"""Where events go: the log, a JSON lines file, Prometheus, OpenTelemetry. Never imports torch."""

from asyncckpt.telemetry.json_lines import JsonLines

__all__ = ["JsonLines"]
