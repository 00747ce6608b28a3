"""Sharded weights, and their exports by ranks: jobs for workers."""

from __future__ import annotations

from typing import Any

import meshes
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.interop import huggingface, plain_files


class Tied(torch.nn.Module):
    """A model whose head is its embedding."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = torch.nn.Embedding(10, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(num_layers))
        self.head = torch.nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight


def save_meshes(path: str, layout: meshes.Layout) -> None:
    """Saves small tensors of several dtypes in every sharding of a mesh."""
    fc.save(path, {"model": meshes.tree(layout, filled=True)}, process_group=dist.group.WORLD)


def save_model(path: str, width: int, num_layers: int) -> None:
    """Saves a model that ranks hold by rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(Tied(width, num_layers), mesh=mesh)
    fc.save(path, {"model": model}, process_group=dist.group.WORLD)


def export(step: str, path: str, options: dict[str, Any]) -> None:
    """Exports with all ranks."""
    huggingface.export(step, path, process_group=dist.group.WORLD, **options)


def failing_export(step: str, path: str) -> str:
    """Exports; rank 1 cannot write. Returns the error."""

    def fail(*_: Any, **__: Any) -> None:
        raise errors.StorageError("no such disk", path=path)

    original = plain_files.write_files
    if dist.get_rank() == 1:
        plain_files.write_files = fail
    try:
        huggingface.export(step, path, max_shard_size=100, process_group=dist.group.WORLD)
    except errors.StorageError as error:
        return str(error)
    finally:
        plain_files.write_files = original
    return ""
