"""A sharded step becomes a directory of the hub: by ranks, by workers, complete or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import export_jobs
import meshes
import pytest
import safetensors.torch
import torch
from full import IS_FULL
from gloo_workers import Workers

from functional_ckpt import errors
from functional_ckpt.cli import app
from functional_ckpt.interop import export_workers, huggingface
from functional_ckpt.interop.export_workers import Job

full_only = pytest.mark.skipif(not IS_FULL, reason="a full run has it")
WIDTH, NUM_LAYERS = (1000, 40) if IS_FULL else (30, 4)


class KilledJob(Job):
    """Kills the workers, of which it is the first call."""

    def output(self) -> Any:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return Job.output(self)


@pytest.fixture(scope="module")
def step(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A step of a model that two ranks hold by rows."""
    path = str(tmp_path_factory.mktemp("sharded") / "step")
    workers.run(2, export_jobs.save_model, path, WIDTH, NUM_LAYERS)
    return path


def content(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def check(directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Compares an export with the model, of which the head is left out."""
    model = export_jobs.Tied(WIDTH, NUM_LAYERS)
    state = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
    found = content(directory)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in state.items())
    assert huggingface.load(directory)["head.weight"].equal(found["embed.weight"])


@pytest.mark.parametrize("layout", [(2,), pytest.param((2, 2), marks=full_only)])
def test_every_sharding_is_put_together(
    layout: meshes.Layout, workers: Workers, tmp_path: Path
) -> None:
    step, out = str(tmp_path / "step"), str(tmp_path / "out")
    workers.run(2 * len(layout), export_jobs.save_meshes, step, layout)
    workers.run(2 * len(layout), export_jobs.export, step, out, {"max_shard_size": 1000})
    assert meshes.wrong(content(tmp_path / "out"), ()) == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4


def test_workers_of_the_command_line(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["export", step, "out", "--to", "hf", "--workers", "2", "--dtype", "bfloat16"]
    assert app.main(command) == 0
    check(tmp_path / "out", torch.bfloat16)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 2
    # Without a conversion the workers do not import torch.
    command = ["export", step, "like", "--to", "hf", "--workers", "2", "--like"]
    assert app.main([*command, "out/model.safetensors.index.json"]) == 0
    check(tmp_path / "like")
    maps = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.index.json")]
    assert len(maps) == 2 and maps[0]["weight_map"] == maps[1]["weight_map"]


def test_an_index_of_another_model(step: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embed.weight": "a", "lm_head.weight": "b"}}))
    with pytest.raises(errors.MismatchError, match=r"lm_head\.weight") as caught:
        huggingface.export(step, tmp_path / "out", like=index)
    assert "layers.0.weight" in caught.value.missing
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_leaves_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_workers, "Job", KilledJob)
    with pytest.raises(errors.StorageError, match="a worker of the export was killed"):
        huggingface.export(step, tmp_path / "out", dtype=torch.bfloat16, num_workers=2)
    assert os.listdir(tmp_path) == []


def test_a_failing_rank_leaves_nothing(step: str, workers: Workers, tmp_path: Path) -> None:
    texts = workers.run(2, export_jobs.failing_export, step, str(tmp_path / "out"))
    assert all("no such disk" in text for text in texts)
    assert os.listdir(tmp_path) == []


def test_workers_and_ranks_exclude_each_other(step: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="not both"):
        huggingface.export(step, tmp_path / "out", num_workers=2, process_group=object())
    with pytest.raises(errors.UsageError, match="at least 1"):
        huggingface.export(step, tmp_path / "out", num_workers=0)
