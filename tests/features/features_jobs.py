"""Jobs of several ranks for the rows that need them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import functional_ckpt as fc


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def train(model: Any, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    model(torch.full((8, 4), float(step + 1))).square().mean().backward()
    optimizer.step()


def fsdp(root: Path) -> None:
    """Trains a sharded model for two steps, and saves them."""
    model = fully_shard(make(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    with fc.CheckpointManager(root) as manager:
        for step in range(manager.restore_or(items).next_step, 2):
            train(model, optimizer, step)
            manager.save(step, items)


def zero(root: Path) -> int:
    """Saves a replicated model and the state that each rank updates; returns the bytes on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, in torch's own module
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = torch.nn.parallel.DistributedDataParallel(make())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    train(model, optimizer, 0)
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "user": fc.Json({"total_steps": 1}),
    }
    with fc.CheckpointManager(root) as manager:
        manager.save(0, items)
        manager.wait_until_finished()
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 1)
        manager.restore(0, items)
        assert all(map(torch.equal, before, model.parameters()))
    dist.barrier()
    return sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
