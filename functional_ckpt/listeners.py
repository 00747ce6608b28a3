"""Event listeners: absl's log, Prometheus, OpenTelemetry, progress bars, trackers.

    manager = fc.CheckpointManager("run", on_event=[fc.listeners.absl_log])

Prometheus and OpenTelemetry are the extras of these names, imported when a listener is made;
wandb and mlflow are those of the user.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from absl import logging as absl_logging

from functional_ckpt import errors
from functional_ckpt.events import Event, Shown, ShowsBars
from functional_ckpt.runtime import progress_bars
from functional_ckpt.storage.paths import is_remote

if TYPE_CHECKING:
    import prometheus_client
    from opentelemetry import metrics, trace

__all__ = ["MLflow", "OpenTelemetry", "ProgressBar", "Prometheus", "WandB", "absl_log"]

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


def _numbers(event: Event, prefix: str) -> dict[str, float]:
    """Returns seconds and bytes of an event, and the numbers among a step's metrics."""
    amounts = {"seconds": event.seconds, "bytes": event.num_bytes}
    found = {f"{prefix}{event.kind}_{name}": value for name, value in amounts.items()}
    found |= {f"{prefix}metrics/{name}": value for name, value in (event.metrics or {}).items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _record(event: Event) -> dict[str, Any]:
    """Returns a step's address and metrics, as JSON."""
    return {"step": event.step, "uri": _uri(event), "metrics": dict(event.metrics or {})}


def _uri(event: Event) -> str:
    path = event.path or event.directory
    return path if is_remote(path) else f"file://{path}"


class WandB:
    """Logs events to a run of Weights & Biases, and each step as an artifact by reference.

    `checkpoint/<kind>_seconds`, `checkpoint/<kind>_bytes` and `checkpoint/metrics/<name>` become
    part of the run's next row: the steps of the training's own rows do not change. An artifact of
    the type `checkpoint` names the directory of a committed or uploaded step; no byte of it is read
    or sent.

    Args:
        run: The run; None for the process's own. A rank without a run logs nothing.
        artifacts: Whether steps are artifacts.

    Raises:
        UsageError: `wandb` is not installed.
    """

    def __init__(self, run: Any = None, *, artifacts: bool = True) -> None:
        self._wandb = _imported("wandb", "WandB")
        self._run = run
        self._artifacts = artifacts

    def __call__(self, event: Event, /) -> None:
        """Logs the event."""
        run = self._wandb.run if self._run is None else self._run
        if run is None:
            return
        run.log({"checkpoint/step": event.step, **_numbers(event, "checkpoint/")}, commit=False)
        if self._artifacts and event.path is not None:
            artifact = self._wandb.Artifact(
                f"checkpoint-{run.id}", type="checkpoint", metadata=_record(event)
            )
            artifact.add_reference(_uri(event), name=f"step-{event.step}", checksum=False)
            run.log_artifact(artifact, aliases=[f"step-{event.step}"])


class MLflow:
    """Logs events to a run of MLflow, and each step's address as a JSON artifact.

    `checkpoint/<kind>_seconds`, `checkpoint/<kind>_bytes` and `checkpoint/metrics/<name>` are
    metrics at the step's number. The artifact `checkpoints/<step>.json` has the URI and the metrics
    of a committed or uploaded step; no byte of it is read or sent.

    Args:
        run_id: The run; None for the active one of this thread. A rank without a run logs nothing.
        artifacts: Whether addresses are artifacts.

    Raises:
        UsageError: `mlflow` is not installed.
    """

    def __init__(self, run_id: str | None = None, *, artifacts: bool = True) -> None:
        mlflow = _imported("mlflow", "MLflow")
        active = mlflow.active_run() if run_id is None else None
        self._run_id = run_id if active is None else active.info.run_id
        self._client = mlflow.MlflowClient()
        self._artifacts = artifacts

    def __call__(self, event: Event, /) -> None:
        """Logs the event."""
        if self._run_id is None:
            return
        for name, value in _numbers(event, "checkpoint/").items():
            self._client.log_metric(self._run_id, name, value, step=event.step)
        if self._artifacts and event.path is not None:
            file = f"checkpoints/{event.step}.json"
            self._client.log_dict(self._run_id, _record(event), file)


def _imported(name: str, listener: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise errors.UsageError(
            f"fc.listeners.{listener} needs {name}: pip install {name}."
        ) from error
