"""Events and listeners, and that a listener cannot break a save."""

from __future__ import annotations

import dataclasses
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch
from absl import logging as absl_logging
from opentelemetry.sdk import metrics as otel_metrics
from opentelemetry.sdk import trace as otel_trace
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import functional_ckpt as fc
from functional_ckpt import testing

_BYTES = 4000


def _items(step: int) -> dict[str, Any]:
    return {"state": {"w": torch.full((_BYTES // 4,), float(step))}}


def _run(near: Path, far: Path, on_event: Any) -> None:
    """Two steps; each tier keeps the latest."""
    latest = fc.policies.LatestN(1)
    tier = fc.Tier(path=far, keep=latest)
    with fc.CheckpointManager(near, keep_policy=latest, tiers=[tier], on_event=on_event) as manager:
        for step in (1, 2):
            manager.save(step, _items(step))
            manager.wait_until_finished()


def test_events_are_emitted_in_order(tmp_path: Path) -> None:
    near, far, seen = tmp_path / "near", tmp_path / "far", list[fc.Event]()
    started = time.time()
    _run(near, far, seen.append)
    told = [(each.kind, each.step, each.directory) for each in seen]
    here, there = str(near), str(far)
    assert told[:4] == [
        ("staged", 1, here),
        ("written", 1, here),
        ("committed", 1, here),
        ("uploaded", 1, there),
    ]
    assert told[4:7] == [("staged", 2, here), ("written", 2, here), ("committed", 2, here)]
    assert sorted(told[7:]) == sorted(  # tiers are concurrent
        [("pruned", 1, here), ("uploaded", 2, there), ("pruned", 1, there)]
    )
    assert {each.num_bytes for each in seen if each.kind in ("staged", "written")} == {_BYTES}
    sent = [each.num_bytes for each in seen if each.kind == "uploaded"]
    files = [file for file in (far / "2").rglob("*") if file.is_file()]
    assert sent[1] == sum(file.stat().st_size for file in files)
    for each in seen:
        assert each.seconds is not None and 0 < each.seconds < 60 and each.rank == 0
        assert started <= each.time.timestamp() <= time.time()


def test_an_event_is_a_record(tmp_path: Path) -> None:
    event = fc.Event(kind="uploaded", step=3, directory="s3://b/run", num_bytes=2**21, seconds=0.5)
    assert str(event) == "step 3 uploaded to s3://b/run, 2.0 MiB, 0.500 s"
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 4  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(fc.errors.UsageError, match="kind must be one of"):
        fc.Event(kind="lost", step=1, directory="d")  # pyright: ignore[reportArgumentType]
    with pytest.raises(fc.errors.UsageError, match="num_bytes must be None or >= 0; got -1"):
        fc.Event(kind="staged", step=1, directory="d", num_bytes=-1)
    for wrong in (3, ["print"]):
        with pytest.raises(
            fc.errors.UsageError, match="on_event must be a callable taking an Event"
        ):
            fc.CheckpointManager(tmp_path, on_event=wrong)  # pyright: ignore[reportArgumentType]


def test_a_listener_that_fails_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = list[fc.Event]()

    def bad(event: fc.Event) -> None:
        raise RuntimeError(f"refused {event.kind}")

    with caplog.at_level(logging.ERROR, "functional_ckpt"):
        _run(tmp_path / "near", tmp_path / "far", [bad, seen.append])
    assert len(seen) == 10  # later listeners are called regardless
    assert len([r for r in caplog.records if "a listener of on_event failed" in r.message]) == 10
    assert "refused uploaded" in caplog.text
    assert fc.restore(tmp_path / "far" / "2")["state"]["w"][0] == 2.0


def test_failed_save_emits_no_committed_event(tmp_path: Path) -> None:
    seen, storage = list[str](), testing.FaultyStorage()
    with fc.CheckpointManager(
        tmp_path, storage=storage, on_event=lambda event: seen.append(event.kind)
    ) as manager:
        storage.inject(testing.Fault(kinds=("rename",)))
        with pytest.raises(fc.errors.SaveError):
            manager.save(1, _items(1)).result()  # type: ignore[union-attr]
    assert seen == ["staged", "written"]


def test_absl_logs_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = absl_logging.get_absl_logger()
    with caplog.at_level(logging.INFO, logger.name):
        _run(tmp_path / "near", tmp_path / "far", fc.listeners.absl_log)
    lines = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert len(lines) == 10
    assert re.fullmatch(r"checkpoint: step 1 staged, \d+(\.\d)? K?i?B, \d+\.\d+ s", lines[0])


def test_prometheus_counts_events(tmp_path: Path) -> None:
    registry = prometheus_client.CollectorRegistry()
    near, far = str(tmp_path / "near"), str(tmp_path / "far")
    _run(Path(near), Path(far), fc.listeners.Prometheus(registry))

    def value(name: str, kind: str, directory: str) -> float | None:
        labels = {"kind": kind, "directory": directory}
        return registry.get_sample_value(f"functional_ckpt_{name}", labels)

    assert value("steps_total", "committed", near) == 2
    assert value("steps_total", "uploaded", far) == 2
    assert value("steps_total", "pruned", far) == 1
    assert value("bytes_total", "written", near) == 2 * _BYTES
    assert value("latest_step", "uploaded", far) == 2
    assert value("seconds_count", "staged", near) == 2
    text = prometheus_client.generate_latest(registry).decode()
    assert "functional_ckpt_steps_total{" in text


def test_opentelemetry_records_events(tmp_path: Path) -> None:
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = otel_trace.TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    meters = otel_metrics.MeterProvider([reader])
    near = tmp_path / "near"
    _run(near, tmp_path / "far", fc.listeners.OpenTelemetry(tracers, meters))
    finished = spans.get_finished_spans()
    assert len(finished) == 10
    first = finished[0]
    assert first.name == "functional_ckpt.staged"
    assert first.attributes == {
        "functional_ckpt.kind": "staged",
        "functional_ckpt.directory": str(near),
        "functional_ckpt.step": 1,
        "functional_ckpt.rank": 0,
        "functional_ckpt.num_bytes": _BYTES,
    }
    assert first.start_time is not None and first.end_time is not None
    assert 0 < first.end_time - first.start_time < 60e9
    data = reader.get_metrics_data()
    assert data is not None
    counted = {
        metric.name: sum(getattr(p, "value", 0) for p in metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert counted["functional_ckpt.steps"] == 10
    assert counted["functional_ckpt.bytes"] > 4 * _BYTES
    assert "functional_ckpt.duration" in counted
    tracers.shutdown()
    meters.shutdown()


@pytest.mark.parametrize(
    ("listener", "module", "extra"),
    [("Prometheus", "prometheus_client", "prometheus"), ("OpenTelemetry", "opentelemetry", "")],
)
def test_without_the_extra_the_error_names_it(
    listener: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as Python has it where nothing is installed
    expected = rf"pip install 'functional-ckpt\[{extra or module}\]'"
    with pytest.raises(fc.errors.UsageError, match=expected):
        getattr(fc.listeners, listener)()


_UPLOADS = """
import sys, torch, functional_ckpt as fc
near, far = sys.argv[1] + "/near", sys.argv[1] + "/far"
bars = None if "no bars" in sys.argv else fc.listeners.ProgressBar()
with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)], on_event=bars) as m:
    m.save(7, {"state": {"w": torch.ones(1_000_000)}})
"""


def _stderr_on_a_terminal(script: str, *arguments: str) -> str:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "400"}
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
    os.close(leader)
    assert process.returncode == 0
    return shown.decode()


def test_uploads_are_shown_on_a_terminal(tmp_path: Path) -> None:
    shown = _stderr_on_a_terminal(_UPLOADS, str(tmp_path))
    assert f"step 7 to {tmp_path}/far" in shown
    assert re.search(r"3\.\d/3\.\d MiB", shown)


def test_no_bar_is_shown_that_was_not_asked_for(tmp_path: Path) -> None:
    assert _stderr_on_a_terminal(_UPLOADS, str(tmp_path), "no bars") == ""


def test_nothing_is_shown_where_there_is_no_terminal(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _UPLOADS, str(tmp_path)], capture_output=True, check=True
    )
    assert process.stderr == b"" and process.stdout == b""
