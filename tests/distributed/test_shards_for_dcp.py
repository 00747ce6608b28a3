"""torch's own readers of safetensors open a step of FSDP2, HSDP and FSDP2 with tensor parallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import shard_jobs
import torch
import torch.distributed.checkpoint as dcp
from full import IS_FULL
from gloo_workers import Workers
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import functional_ckpt as fc

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(not IS_FULL, reason="four ranks for each kind; a full run has it"),
]


@pytest.fixture(params=shard_jobs.KINDS)
def step(request: pytest.FixtureRequest, workers: Workers, tmp_path: Path) -> Path:
    workers.run(4, shard_jobs.save, str(tmp_path / "step"), request.param)
    return tmp_path / "step"


def check(found: dict[str, torch.Tensor]) -> None:
    expected = shard_jobs.Uneven().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_reader_of_dcp(step: Path) -> None:
    assert len(list((step / "model").glob("shard-*.safetensors"))) == 4
    found = {
        name: torch.zeros_like(each) for name, each in shard_jobs.Uneven().state_dict().items()
    }
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(step / "model")), no_dist=True)
    check(found)
    check(dict(fc.restore(step)["model"]))


def test_the_consolidation_of_dcp(step: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    files = {name: 1 + place % 2 for place, name in enumerate(shard_jobs.Uneven().state_dict())}
    consolidate_safetensors_files(str(step / "model"), str(out), files)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    assert len(list(out.glob("*.safetensors"))) == 2
    check(found)
