"""Steps of several ranks that share files: jobs for worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import functional_ckpt as fc

SIZE = 1000  # half of a square of float32 is larger than a megabyte


def adapted(*, is_sharded: bool) -> torch.nn.Module:
    """Two frozen layers and a trained one, on every rank or sharded over them."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False) for _ in range(2)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(SIZE, 2))
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def save_steps(root: Path, kind: str) -> list[Any]:
    """Saves three steps, the third after this rank's first frozen layer changed, and a fourth."""
    model = adapted(is_sharded=kind == "sharded")
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    if kind == "disagreeing" and dist.get_rank():
        model[1].requires_grad_(True)  # type: ignore[index]
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    with fc.CheckpointManager(root) as manager:
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    for parameter in model[0].parameters():  # type: ignore[index]
                        parameter += 1
            model(torch.ones(1, SIZE)).sum().backward()
            optimizer.step()
            manager.save(step, items)
        manager.wait_until_finished()
        if kind != "disagreeing":
            fresh = adapted(is_sharded=kind == "sharded")
            manager.restore(1, into={"model": fresh, "optimizer": None})
            manager.restore(3, into={"model": fresh, "optimizer": None})
            for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
                pairs = [
                    getattr(each, "to_local", lambda each=each: each)() for each in (one, other)
                ]
                assert torch.equal(*pairs)
    return [each.requires_grad for each in model.parameters()]
