"""Ranks on an object store: each writes its shards, and reads those of others."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import disks
import pytest
import rank_jobs
import torch
from gloo_workers import Workers

import functional_ckpt as fc


@pytest.fixture(scope="module")
def workers() -> Generator[Workers]:
    started = Workers()
    yield started
    started.close()


def test_four_ranks_save_and_two_restore(bucket: str, workers: Workers) -> None:
    names = ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    names = names if bucket.startswith("s3:") else ("STORAGE_EMULATOR_HOST",)
    environ = {name: os.environ[name] for name in names}
    run = f"{bucket}/run"
    assert workers.run(4, rank_jobs.save, environ, run, 3) == [[5]] * 4
    assert workers.run(2, rank_jobs.restore, environ, run, 3) == [True] * 2
    whole = fc.restore(f"{run}/5")["model"]
    torch.manual_seed(3)
    assert torch.equal(whole["0.weight"], torch.nn.Linear(30, 50).weight)


def test_full_disk_of_ranks_deletes_steps_that_another_tier_has(
    workers: Workers, tmp_path: Path
) -> None:
    """Steps of 0.8 MB on 4 MiB: if any rank's disk is full, all of them write again."""
    far, num_steps = tmp_path / "far", 8
    with disks.small("tmpfs", tmp_path) as disk:
        near = disk / "run"
        outcomes = workers.run(2, rank_jobs.fill, str(near), str(far), num_steps)
        with fc.CheckpointManager(near, read_only=True) as manager:
            left = manager.all_steps()
    assert outcomes == [(list(range(num_steps)), left)] * 2, "a rank lists steps that are gone"
    assert left and left == list(range(left[0], num_steps)) and left[0] > 0
    for step in range(num_steps):
        whole = fc.restore(far / str(step))["tree"]["w"]
        assert float(whole.min()) == float(whole.max()) == step
