"""PyTorch's distributed checkpoint API over steps in object stores."""

from __future__ import annotations

import os

import pytest
import rank_jobs
import torch
import torch.distributed.checkpoint as dcp
from full import IS_FULL
from gloo_workers import Workers
from torch.distributed.checkpoint.api import CheckpointException

import functional_ckpt as fc
from functional_ckpt.interop.dcp import Reader, Writer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_dict_is_saved_and_loaded(bucket: str) -> None:
    path = f"{bucket}/run/3"
    state = {"model": {"w": torch.rand(5, 3)}, "epoch": 2}
    dcp.save(state, storage_writer=Writer(path))
    with pytest.raises(CheckpointException, match="overwrite=True"):
        dcp.save(state, storage_writer=Writer(path))
    dcp.save({**state, "epoch": 4}, storage_writer=Writer(path, overwrite=True))
    wanted = {"model": {"w": torch.zeros(5, 3)}, "epoch": 0}
    dcp.load(wanted, storage_reader=Reader(path))
    assert torch.equal(wanted["model"]["w"], state["model"]["w"])  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert wanted["epoch"] == 4
    with fc.CheckpointManager(f"{bucket}/run", read_only=True) as manager:
        assert manager.all_steps() == [3]


@pytest.mark.skipif(not IS_FULL, reason="a full run has it")
def test_ranks_save_their_shards(bucket: str) -> None:
    names = ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    names = names if bucket.startswith("s3:") else ("STORAGE_EMULATOR_HOST",)
    environ = {name: os.environ[name] for name in names}
    workers = Workers()
    try:
        assert workers.run(2, rank_jobs.save_state_dict, environ, f"{bucket}/a") == [True, True]
    finally:
        workers.close()
