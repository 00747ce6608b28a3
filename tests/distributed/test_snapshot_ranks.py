"""SIGTERM to one of several ranks: all save the copies that they hold of one step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from managing import looked_into
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import functional_ckpt as fc


def _wait_for(root: Path, step: int) -> bool:
    """Waits without a call of the manager, as an evaluation does."""
    deadline = time.monotonic() + 60
    while not (root / str(step)).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return (root / str(step)).exists()


def train(root: Path, *, is_ahead: bool) -> tuple[bool, list[int], bool]:
    """Returns whether the copy of step 3 is saved, all steps, and whether the loop was left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policies = [1000, fc.policies.Preemption(snapshot_every=1, grace_seconds=0.1)]
    with fc.CheckpointManager(root, save_policy=policies) as manager:

        def save(step: int) -> None:
            value = distribute_tensor(torch.full((8,), float(step)), mesh, [Shard(0)])
            manager.save(step, {"tree": {"w": value}})

        for step in (1, 2, 3):
            save(step)
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        # A rank that is ahead waits for the other one within `save`.
        is_saved = (is_ahead and dist.get_rank() == 0) or _wait_for(root, 3)
        for step in range(4, 100):
            save(step)
            if manager.reached_preemption(step):
                break
        manager.wait_until_finished()
        return is_saved, manager.all_steps(), manager.latest_step() == step


@pytest.mark.parametrize("is_ahead", [False, True])
def test_all_ranks_save_the_same_copy(workers: Workers, is_ahead: bool, tmp_path: Path) -> None:
    found = workers.run(2, train_ahead if is_ahead else train_together, tmp_path)
    (is_saved, steps, is_left) = found[0]
    assert found[1] == found[0] and is_saved and is_left
    assert steps[0] == 3
    for step in steps:
        assert fc.restore(tmp_path / str(step))["tree"]["w"].tolist() == [step] * 8
    with looked_into(tmp_path) as eye:
        assert eye.all_steps() == steps


def train_ahead(root: Path) -> tuple[bool, list[int], bool]:
    return train(root, is_ahead=True)


def train_together(root: Path) -> tuple[bool, list[int], bool]:
    return train(root, is_ahead=False)
