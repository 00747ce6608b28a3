"""Run under torchrun by four processes: saves DTensors of which every full value is known.

    torchrun --nproc-per-node=4 sharded_writer.py CHECKPOINTS KNOWN

Rank 0 writes to KNOWN the values that an eager reader must find (`arrays.npz`, `values.json`, by
path) and how each array was sharded (`placements.json`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import functional_ckpt as fc


class Model(nn.Module):
    """Shapes that no mesh of 2 x 2 divides: 10 is 5 + 5 and then 3 + 2, 7 is 4 + 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 8)
        self.head = nn.Linear(8, 7, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(tokens))
        return self.head(x + self.down(self.up(x).relu())).square().mean()


def parallelize(model: Model, mesh: DeviceMesh) -> None:
    parallelize_module(
        model,
        mesh["tp"],
        {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    fully_shard(model, mesh=mesh["dp"])


def arrays(mesh: DeviceMesh) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Full arrays, and the same sharded."""
    full = {
        "both dims": torch.arange(35, dtype=torch.float32).reshape(7, 5),
        "one dim twice": torch.arange(44, dtype=torch.int32).reshape(11, 4) - 7,
        "nothing for most": torch.arange(10, dtype=torch.float16).reshape(1, 10),
        "replicated": torch.arange(12, dtype=torch.float64).reshape(3, 4) / 3,
        "hybrid": torch.arange(20) % 3 == 0,
        "plain": torch.arange(6, dtype=torch.uint8),
    }
    placements = {
        "both dims": (Shard(0), Shard(1)),
        "one dim twice": (Shard(0), Shard(0)),
        "nothing for most": (Shard(0), Shard(0)),
        "replicated": (Replicate(), Replicate()),
        "hybrid": (Replicate(), Shard(0)),
    }
    sharded = {name: distribute_tensor(full[name], mesh, cuts) for name, cuts in placements.items()}
    return full, sharded | {"plain": full["plain"]}


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, (dict, list, tuple)):
        yield "/".join(path), tree
        return
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(child, (*path, str(key)))


def main() -> None:
    checkpoints, known = map(Path, sys.argv[1:])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    parallelize(model, mesh)
    # With a learning rate of zero a step makes moments and leaves the weights as they are known.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, foreach=False)
    tokens = torch.arange(12).reshape(3, 4) % 7
    model(tokens).backward()
    optimizer.step()
    full, sharded = arrays(mesh)
    item = fc.Optimizer(optimizer, model)
    with fc.CheckpointManager(checkpoints) as manager:
        manager.save(5, {"model": model, "optimizer": item, "arrays": sharded})

    live = {"model": model.state_dict(), "optimizer": item.handler.lower(item.value)}
    placements = {
        name: [repr(placement) for placement in leaf.placements]
        for name, leaf in leaves({**live, "arrays": sharded})
        if isinstance(leaf, DTensor)
    }
    moments = {
        name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
        for name, leaf in leaves({"optimizer": live["optimizer"]})
    }
    if dist.get_rank() == 0:
        expected = dict(leaves({"model": weights, "arrays": full})) | moments
        tensors = {k: v.numpy() for k, v in expected.items() if isinstance(v, torch.Tensor)}
        known.mkdir()
        np.savez(known / "arrays.npz", **tensors)
        values = {k: v for k, v in expected.items() if k not in tensors and v is not None}
        (known / "values.json").write_text(json.dumps(values))
        (known / "placements.json").write_text(json.dumps(placements))
    dist.destroy_process_group()


def leave() -> None:
    """Ends the process without ending the interpreter; everything is closed, and durable.

    torch keeps two of the mesh's groups after `destroy_process_group`. Their threads run on while
    the libraries that they call are taken down, and once in a while one of them aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
