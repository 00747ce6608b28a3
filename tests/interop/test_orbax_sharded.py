"""Saved by four processes under FSDP2 x TP, restored by plain Orbax onto four JAX devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

import functional_ckpt as fc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

HERE = Path(__file__).parent
STEP = 5


def run(*command: str | Path, **environment: str) -> str:
    """Runs Python in a process; returns its output."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `checkpoints` and their `known` values."""
    path = tmp_path_factory.mktemp("sharded")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    run(*torchrun, HERE / "sharded_writer.py", path / "checkpoints", path / "known")
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_shards_are_strided_and_uneven(saved: Path) -> None:
    """The preconditions of the other tests hold."""
    placements = read_json(saved / "known" / "placements.json")
    shapes = {name: array.shape for name, array in np.load(saved / "known" / "arrays.npz").items()}
    strided = {
        name: shapes[name] for name, cuts in placements.items() if "_StridedShard" in str(cuts)
    }
    assert strided["model/up.weight"] == (10, 8)
    assert strided["model/head.weight"] == (7, 8)
    assert strided["optimizer/state/up.bias/exp_avg_sq"] == (10,)
    assert len(placements["model/norm.weight"]) == 1  # a mesh of its own on every second rank
    assert len(placements["model/down.weight"]) == 2


def test_orbax_restores_onto_other_devices(saved: Path) -> None:
    output = run(
        *(HERE / "sharded_reader.py", saved / "checkpoints", str(STEP), saved / "known"),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    outcome = json.loads(output.splitlines()[-1])
    assert outcome["differences"] == []
    shapes = outcome["shard_shapes"]
    assert shapes["model/up.weight"] == [10, 2]
    assert shapes["model/head.weight"] == [7, 2]
    assert shapes["model/down.weight"] == [2, 10]
    assert shapes["optimizer/state/down.weight/exp_avg"] == [2, 10]
    assert shapes["arrays/nothing for most"] == [1, 5]
    assert shapes["arrays/hybrid"] == [5]
    assert shapes["arrays/both dims"] == [7, 5]
    assert shapes["optimizer/state/up.weight/step"] == []


def test_one_process_restores_the_known_values(saved: Path) -> None:
    restored = fc.restore(saved / "checkpoints" / str(STEP))
    known = dict(np.load(saved / "known" / "arrays.npz"))
    for item in ("model", "arrays"):
        for name, value in restored[item].items():
            assert torch.equal(value, torch.from_numpy(known.pop(f"{item}/{name}")))
    for name, state in restored["optimizer"]["state"].items():
        for key, value in state.items():
            expected = torch.from_numpy(known.pop(f"optimizer/state/{name}/{key}"))
            assert torch.equal(value, expected)
    assert known == {}


def test_every_box_has_one_writer(saved: Path) -> None:
    for item in ("model", "optimizer", "arrays"):
        folder = saved / "checkpoints" / str(STEP) / item
        assert len(list(folder.glob("shard-*.safetensors"))) == 4
        boxes: Counter[tuple[str, str]] = Counter()
        for file in folder.glob("shard-*.safetensors"):
            with safetensors.safe_open(file, "pt") as opened:
                offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            boxes.update((name, str(each)) for name, each in offsets.items())
        assert len(boxes) > 10 and set(boxes.values()) == {1}
