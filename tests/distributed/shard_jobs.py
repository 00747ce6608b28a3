"""Models of uneven sizes that four ranks hold in parts: jobs for workers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import functional_ckpt as fc

KINDS = ("fsdp", "hsdp", "fsdp-tp")


class Uneven(torch.nn.Module):
    """Sizes that neither two nor four divide, and a parameter with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(37, 13)
        self.up = torch.nn.Linear(13, 29)
        self.down = torch.nn.Linear(29, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.head = torch.nn.Linear(13, 3, dtype=torch.bfloat16)


def parallel(kind: str) -> torch.nn.Module:
    """The model over all ranks."""
    model: torch.nn.Module = Uneven()
    if kind == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    names = ("replicas", "shards") if kind == "hsdp" else ("dp", "tp")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    if kind == "hsdp":
        return fully_shard(model, mesh=mesh)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return fully_shard(parallelize_module(model, mesh["tp"], plan), mesh=mesh["dp"])


def save(path: str, kind: str) -> None:
    """Saves the model as a step's only item."""
    fc.save(path, {"model": parallel(kind)}, process_group=dist.group.WORLD)
