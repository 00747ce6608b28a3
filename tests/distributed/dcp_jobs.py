"""State dicts saved and loaded with PyTorch's API over steps: jobs for workers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as helpers
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import functional_ckpt as fc
from functional_ckpt.interop.dcp import Reader, Writer


def _trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    for _ in range(2):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _state(seed: int) -> dict[str, Any]:
    model, optimizer = _trained(seed)
    names, state = helpers.get_state_dict(model, optimizer)
    return {"model": names, "optim": state, "step": seed}


def _full(state: Any) -> Any:
    leaves = torch.utils._pytree.tree_leaves(state)
    tensors = [each.full_tensor() if isinstance(each, DTensor) else each for each in leaves]
    return [each.tolist() if isinstance(each, torch.Tensor) else each for each in tensors]


def save(directory: str, is_async: bool) -> Any:
    """Saves an FSDP2 model with its optimizer; returns all values."""
    state = _state(0)
    writer = Writer(f"{directory}/1")
    if is_async:
        future: Any = dcp.async_save(state, storage_writer=writer)
        future.result()
    else:
        dcp.save(state, storage_writer=writer)
    return _full(state)


def load(directory: str) -> Any:
    """Loads it into another model, through the state-dict helpers; returns all values."""
    model, optimizer = _trained(1)
    names, state = helpers.get_state_dict(model, optimizer)
    loaded = {"model": names, "optim": state, "step": 0}
    dcp.load(loaded, storage_reader=Reader(f"{directory}/1"))
    helpers.set_state_dict(model, optimizer, model_state_dict=names, optim_state_dict=state)
    again = helpers.get_state_dict(model, optimizer)
    return _full({"model": again[0], "optim": again[1], "step": loaded["step"]})


def reshard(directory: str) -> list[bool]:
    """Saves tensors in many shardings, and loads each in all others."""
    ranks = dist.get_world_size()
    shape = (2, ranks // 2) if ranks > 2 else (1, ranks)
    meshes = [init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", shape)]
    placements: list[tuple[Any, list[Any]]] = [
        (meshes[0], [Shard(0)]),
        (meshes[0], [Shard(1)]),
        (meshes[0], [Replicate()]),
        (meshes[1], [Shard(0), Shard(1)]),
        (meshes[1], [Replicate(), Shard(1)]),
        (meshes[1], [Shard(0), Shard(0)]),
    ]
    torch.manual_seed(3)
    values = {f"{rows}x{columns}": torch.randn(rows, columns) for rows, columns in [(9, 7), (1, 5)]}
    saved = {
        f"{number}": {name: distribute_tensor(v, mesh, how) for name, v in values.items()}
        for number, (mesh, how) in enumerate(placements)
    }
    saved["plain"] = {name: value.clone() for name, value in values.items()}
    dcp.save(saved, storage_writer=Writer(f"{directory}/all"))
    equal: list[bool] = []
    for mesh, how in placements:
        blank = {
            key: {
                name: distribute_tensor(torch.zeros_like(value), mesh, how)
                for name, value in values.items()
            }
            for key in saved
        }
        dcp.load(blank, storage_reader=Reader(f"{directory}/all"))
        equal += [
            torch.equal(tensor.full_tensor(), values[name])
            for entry in blank.values()
            for name, tensor in entry.items()
        ]
    restored = fc.restore(f"{directory}/all")
    equal += [torch.equal(restored[key][name], values[name]) for key in saved for name in values]
    return equal


def stages(directory: str) -> dict[str, Any]:
    """Saves keys that only one rank has, as stages of a pipeline."""
    rank = dist.get_rank()
    state = {"model": {f"layer{rank}": torch.full((2,), float(rank)), "shared": torch.ones(1)}}
    state[f"only{rank}"] = {"rank": torch.tensor(rank)}
    dcp.save(state, storage_writer=Writer(f"{directory}/stages"))
    blank = {"model": {f"layer{rank}": torch.zeros(2), "shared": torch.zeros(1)}}
    dcp.load(blank, storage_reader=Reader(f"{directory}/stages"))
    assert blank["model"][f"layer{rank}"].tolist() == [rank, rank]
    return {name: sorted(item) for name, item in fc.restore(f"{directory}/stages").items()}


def subgroup(directory: str) -> list[str]:
    """Saves on the last two ranks only."""
    ranks = [dist.get_world_size() - 2, dist.get_world_size() - 1]
    group = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        state = {"x": {"w": torch.full((2,), 4.0)}}
        dcp.save(state, storage_writer=Writer(f"{directory}/part"), process_group=group)
    dist.barrier()
    return fc.restore(f"{directory}/part")["x"]["w"].tolist()


def failing(directory: str) -> str:
    """A rank whose data cannot be read: the save fails on all, and nothing is visible."""

    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if dist.get_rank() == 1:
                raise OSError("no data")
            return super().resolve_data(write_item)

    writer = Writer(f"{directory}/failed")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"x": {"w": distribute_tensor(torch.ones(8), mesh, [Shard(0)])}}
    try:
        dcp.save(state, storage_writer=writer, planner=Failing())
    except CheckpointException as error:
        writer.reset()
        return str(error)
    return ""
