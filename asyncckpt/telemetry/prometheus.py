"""Events as Prometheus metrics; needs ``pip install 'asyncckpt[metrics]'``.

Names and units follow the Prometheus conventions: base units (seconds, bytes), ``_total`` for counters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from asyncckpt.errors import InvalidOptionError
from asyncckpt.events import Event

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
except ImportError as error:
    raise ImportError(
        "asyncckpt.telemetry.prometheus needs prometheus-client: pip install 'asyncckpt[metrics]'"
    ) from error

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

__all__ = ["PrometheusExporter"]

# A save blocks for milliseconds and is durable after seconds or minutes.
_BLOCKED_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURABLE_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_M = TypeVar("_M", Counter, Gauge, Histogram)
_OUTCOMES = ("durable", "failed", "skipped", "superseded", "cancelled")


class PrometheusExporter:
    """Keeps metrics up to date with the events it is called with; give it as ``on_event=``.

    One exporter may serve several checkpointers; their numbers are added up.

    Args:
        registry: where the metrics are registered; None is the global one of ``prometheus_client``.
        port: serve *registry* over HTTP there, on all interfaces; 0 takes a free port. None serves nothing:
            your program does, or pushes.
        address: interface to serve on.

    Attributes:
        port: where metrics are served, or None.

    Raises:
        InvalidOptionError: the port cannot be had, or *registry* has these metrics already.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, port: int | None = None, address: str = "0.0.0.0"
    ) -> None:
        self._registry = REGISTRY if registry is None else registry
        self._server: WSGIServer | None = None
        self.port: int | None = None
        try:
            self._metrics = _Metrics(self._registry)
        except ValueError as error:
            raise InvalidOptionError(f"this registry has an exporter already; share it: {error}") from error
        if port is not None:
            self._serve(port, address)

    def _serve(self, port: int, address: str) -> None:
        try:
            self._server, self._thread = start_http_server(port, address, self._registry)
        except (OSError, OverflowError) as error:
            self._metrics.unregister(self._registry)
            raise InvalidOptionError(f"metrics cannot be served on {address}:{port}: {error}") from error
        self.port = self._server.server_port

    def __call__(self, event: Event) -> None:
        """Count *event*."""
        metrics, values = self._metrics, event.fields
        match event.name:
            case "save.started":
                metrics.pending.inc()
                metrics.blocked.observe(values["blocked_s"])
            case "save.durable":
                self._note_durable(event)
            case "save.failed":
                metrics.failures.labels(values["error"]).inc()
            case "checkpoint.pruned":
                metrics.pruned.inc()
            case "restore.done":
                metrics.restores.labels("done").inc()
                metrics.restore.observe(values["restore_s"])
                metrics.fallbacks.inc(len(values["fell_back_from"]))
            case "restore.failed":
                metrics.restores.labels("failed").inc()
            case "writer.restarted":
                metrics.writer_restarts.inc()
        outcome = event.name.removeprefix("save.")
        if outcome in _OUTCOMES:
            metrics.saves.labels(outcome).inc()
            metrics.pending.dec()

    def _note_durable(self, event: Event) -> None:
        metrics, values = self._metrics, event.fields
        metrics.stage.observe(values["stage_s"])
        metrics.durable.observe(values["durable_s"])
        metrics.commit.observe(values["commit_s"])
        metrics.raw_bytes.inc(values["raw_bytes"])
        metrics.stored_bytes.inc(values["stored_bytes"])
        metrics.linked_bytes.inc(values["linked_bytes"])
        metrics.last_step.set(event.step or 0)
        metrics.last_timestamp.set(event.time)
        if values["stored_bytes"]:
            metrics.ratio.set(values["raw_bytes"] / values["stored_bytes"])

    def close(self) -> None:
        """Stop serving and take the metrics out of the registry. Idempotent."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server, self.port = None, None
        self._metrics.unregister(self._registry)

    def __repr__(self) -> str:
        return f"<PrometheusExporter {'not serving' if self.port is None else f'on port {self.port}'}>"


class _Metrics:
    """The metrics themselves; `docs/telemetry.md` lists them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._all: list[Counter | Gauge | Histogram] = []
        try:
            self._register(registry)
        except ValueError:
            self.unregister(registry)
            raise

    def _register(self, registry: CollectorRegistry) -> None:
        def counter(name: str, about: str, *labels: str) -> Counter:
            return self._keep(Counter(f"asyncckpt_{name}", about, labels, registry=registry))

        def gauge(name: str, about: str) -> Gauge:
            return self._keep(Gauge(f"asyncckpt_{name}", about, registry=registry))

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return self._keep(Histogram(f"asyncckpt_{name}", about, buckets=buckets, registry=registry))

        self.saves = counter("saves_total", "Saves that ended, by outcome.", "outcome")
        self.failures = counter("save_failures_total", "Failed saves, by code of the error.", "code")
        self.pending = gauge("saves_pending", "Saves being staged or written.")
        self.blocked = histogram("save_blocked_seconds", "How long save() kept the caller.", _BLOCKED_BUCKETS)
        self.stage = histogram("save_stage_seconds", "From save() until the snapshot was staged.", _BLOCKED_BUCKETS)
        self.durable = histogram("save_durable_seconds", "From save() until durable.", _DURABLE_BUCKETS)
        self.commit = histogram("save_commit_seconds", "Flush, header, rename and fsyncs.", _DURABLE_BUCKETS)
        self.raw_bytes = counter("save_raw_bytes_total", "Bytes of the tensors of durable saves.")
        self.stored_bytes = counter("save_stored_bytes_total", "Bytes of the files of durable saves.")
        self.linked_bytes = counter("save_linked_bytes_total", "Stored bytes shared with the previous step.")
        self.last_step = gauge("last_durable_step", "Training step of the last durable save.")
        self.last_timestamp = gauge("last_durable_timestamp_seconds", "When it became durable, since the epoch.")
        self.ratio = gauge("last_compression_ratio", "Raw bytes by stored bytes of the last durable save.")
        self.pruned = counter("checkpoints_pruned_total", "Checkpoints that retention removed.")
        self.restores = counter("restores_total", "Calls of restore(), by result.", "result")
        self.restore = histogram("restore_seconds", "How long restore() took.", _DURABLE_BUCKETS)
        self.fallbacks = counter("restore_fallbacks_total", "Damaged checkpoints skipped by restore().")
        self.writer_restarts = counter("writer_restarts_total", "Writers that were replaced.")
        for outcome in _OUTCOMES:  # a series that appears with its first failure cannot be alerted on
            self.saves.labels(outcome)

    def _keep(self, metric: _M) -> _M:
        self._all.append(metric)
        return metric

    def unregister(self, registry: CollectorRegistry) -> None:
        while self._all:
            registry.unregister(self._all.pop())
