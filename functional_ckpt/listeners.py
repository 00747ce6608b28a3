"""Event listeners: absl's log, Prometheus, OpenTelemetry, progress bars.

    manager = fc.CheckpointManager("run", on_event=[fc.listeners.absl_log])

Prometheus and OpenTelemetry are the extras of these names, imported when a listener is made.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from absl import logging as absl_logging

from functional_ckpt import errors
from functional_ckpt.events import Event, Shown, ShowsBars
from functional_ckpt.runtime import progress_bars

if TYPE_CHECKING:
    import prometheus_client
    from opentelemetry import metrics, trace

__all__ = ["OpenTelemetry", "ProgressBar", "Prometheus", "absl_log"]

_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


def absl_log(event: Event) -> None:
    """Logs the event by absl, as a line of the level INFO."""
    absl_logging.info("checkpoint: %s", event)


class ProgressBar(ShowsBars):
    """Shows a progress bar on standard error for each save, restore and upload in progress.

    On a terminal and in notebooks; elsewhere, and on ranks other than the primary, nothing.
    """

    def bar(self, title: str) -> contextlib.AbstractContextManager[Shown]:
        """Returns a bar that is there while the work lasts."""
        return progress_bars.bar(title)

    def __call__(self, event: Event, /) -> None:
        """Ignores the event: bars show only work in progress."""


class Prometheus:
    """Counts events for Prometheus, by `kind` and `directory`.

    `functional_ckpt_steps_total`, `functional_ckpt_bytes_total`, the histogram
    `functional_ckpt_seconds`, and `functional_ckpt_latest_step`, the step of the latest event. Make
    one for all managers of a process: a registry takes each name once.

    Args:
        registry: Where the metrics are; None for the one that `prometheus_client` serves.

    Raises:
        UsageError: `prometheus_client` is not installed.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise errors.UsageError(
                "fc.listeners.Prometheus needs prometheus-client: pip install "
                "'functional-ckpt[prometheus]'."
            ) from error
        where = registry if registry is not None else prometheus_client.REGISTRY
        labels = ("kind", "directory")
        self._steps = prometheus_client.Counter(
            "functional_ckpt_steps", "Steps that got so far.", labels, registry=where
        )
        self._bytes = prometheus_client.Counter(
            "functional_ckpt_bytes", "Bytes staged, written and uploaded.", labels, registry=where
        )
        self._seconds = prometheus_client.Histogram(
            "functional_ckpt_seconds", "How long it took.", labels, registry=where, buckets=_BUCKETS
        )
        self._latest = prometheus_client.Gauge(
            "functional_ckpt_latest_step", "The step of the latest event.", labels, registry=where
        )

    def __call__(self, event: Event, /) -> None:
        """Counts the event."""
        labels = (event.kind, event.directory)
        self._steps.labels(*labels).inc()
        self._latest.labels(*labels).set(event.step)
        if event.num_bytes is not None:
            self._bytes.labels(*labels).inc(event.num_bytes)
        if event.seconds is not None:
            self._seconds.labels(*labels).observe(event.seconds)


class OpenTelemetry:
    """Records events with OpenTelemetry: a span and metrics of each.

    The span `functional_ckpt.<kind>` has the duration of the event, with the attributes `step`,
    `directory`, `rank` and `num_bytes` below `functional_ckpt.`. The metrics are
    `functional_ckpt.steps`, `functional_ckpt.bytes` and `functional_ckpt.duration`, by kind and
    directory.

    Args:
        tracer_provider: Makes the spans; None for the process's own.
        meter_provider: Makes the metrics; None for the process's own.

    Raises:
        UsageError: `opentelemetry-api` is not installed.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        try:
            from opentelemetry import metrics, trace
        except ImportError as error:
            raise errors.UsageError(
                "fc.listeners.OpenTelemetry needs opentelemetry-api: pip install "
                "'functional-ckpt[opentelemetry]'."
            ) from error
        self._tracer = trace.get_tracer("functional_ckpt", tracer_provider=tracer_provider)
        meter = metrics.get_meter("functional_ckpt", meter_provider=meter_provider)
        self._steps = meter.create_counter("functional_ckpt.steps", "{step}", "Steps so far.")
        self._bytes = meter.create_counter("functional_ckpt.bytes", "By", "Bytes so far.")
        self._seconds = meter.create_histogram("functional_ckpt.duration", "s", "How long it took.")

    def __call__(self, event: Event, /) -> None:
        """Records the event."""
        labels = {"functional_ckpt.kind": event.kind, "functional_ckpt.directory": event.directory}
        self._steps.add(1, labels)
        attributes: dict[str, str | int] = {
            **labels,
            "functional_ckpt.step": event.step,
            "functional_ckpt.rank": event.rank,
        }
        if event.num_bytes is not None:
            self._bytes.add(event.num_bytes, labels)
            attributes["functional_ckpt.num_bytes"] = event.num_bytes
        if event.seconds is not None:
            self._seconds.record(event.seconds, labels)
        end_ns = int(event.time.timestamp() * 1e9)
        span = self._tracer.start_span(
            f"functional_ckpt.{event.kind}",
            start_time=end_ns - int((event.seconds or 0.0) * 1e9),
            attributes=attributes,
        )
        span.end(end_ns)
