"""Weights & Biases and MLflow, offline: seconds, bytes, metrics, and steps by reference."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc

full_only = pytest.mark.skipif(
    os.environ.get("FUNCTIONAL_CKPT_FULL") != "1", reason="starts a service: a full run has it"
)
ITEMS = {"state": {"w": torch.ones(1000)}}


class FakeRun:
    """A run of wandb that keeps its calls."""

    id = "r1"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[tuple[Any, list[str]]] = []

    def log(self, row: dict[str, Any], *, commit: bool) -> None:
        assert not commit  # the row is the training's
        self.rows.append(row)

    def log_artifact(self, artifact: Any, *, aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))


class FakeArtifact:
    """An artifact that keeps its references."""

    def __init__(self, name: str, *, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.type, self.metadata = name, type, metadata
        self.references: list[tuple[str, str]] = []

    def add_reference(self, uri: str, *, name: str, checksum: bool) -> None:
        assert not checksum  # nothing is read
        self.references.append((uri, name))


class FakeWandb:
    """The package."""

    run: Any = None
    Artifact = FakeArtifact


def test_wandb_gets_numbers_and_references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)  # pyright: ignore[reportArgumentType]
    run = FakeRun()
    listeners = [fc.listeners.WandB(run), fc.listeners.WandB()]  # the second has no run
    with fc.CheckpointManager(tmp_path / "run", on_event=listeners, keep_policy=1) as manager:
        for step in (1, 2):
            manager.save(step, ITEMS, metrics={"loss": 0.5, "note": "a"})
    names = {name for row in run.rows for name in row}
    assert {"checkpoint/committed_seconds", "checkpoint/written_bytes"} <= names
    assert "checkpoint/metrics/loss" in names and "checkpoint/metrics/note" not in names
    (first, aliases), (second, _) = run.artifacts
    assert (first.name, first.type, aliases) == ("checkpoint-r1", "checkpoint", ["step-1"])
    assert second.references == [(f"file://{tmp_path}/run/2", "step-2")]
    assert second.metadata["metrics"] == {"loss": 0.5, "note": "a"}


@pytest.mark.parametrize("listener", ["WandB", "MLflow"])
def test_a_missing_package_is_an_error_that_names_it(
    listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, listener.lower(), None)
    with pytest.raises(fc.errors.UsageError, match=f"pip install {listener.lower()}"):
        getattr(fc.listeners, listener)()


@full_only
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    with wandb.init(mode="offline", dir=tmp_path, project="p") as run:
        listener = fc.listeners.WandB()
        with fc.CheckpointManager(tmp_path / "run", on_event=listener) as manager:
            for step in (1, 2):
                run.log({"loss": 0.1}, step=step)
                manager.save(step, ITEMS, metrics={"accuracy": 0.9})
                manager.wait_until_finished()
        run.log({"loss": 0.1}, step=3)
        assert run.summary["checkpoint/step"] == 2
        assert run.summary["checkpoint/metrics/accuracy"] == 0.9
        assert run.summary["checkpoint/committed_seconds"] > 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    assert f"file://{tmp_path}/run/2".encode() in written


@full_only
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        listener = fc.listeners.MLflow()
        with fc.CheckpointManager(tmp_path / "run", on_event=listener) as manager:
            manager.save(7, ITEMS, metrics={"accuracy": 0.9})
    found = mlflow.get_run(run.info.run_id).data.metrics
    assert found["checkpoint/metrics/accuracy"] == 0.9
    assert found["checkpoint/written_bytes"] == 4000
    (record,) = (tmp_path / "mlruns").rglob("checkpoints/7.json")
    assert json.loads(record.read_text()) == {
        "step": 7,
        "uri": f"file://{tmp_path}/run/7",
        "metrics": {"accuracy": 0.9},
    }
