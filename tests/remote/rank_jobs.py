"""Jobs of ranks on an object store; run by `gloo_workers.Workers`."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import functional_ckpt as fc
from functional_ckpt.storage.object_store import ObjectStorage


def _model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.ReLU(), torch.nn.Linear(50, 7))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(environ: Mapping[str, str], run: str, seed: int) -> list[int]:
    """Saves FSDP2's shards; the steps that are there."""
    os.environ.update(environ)
    with fc.CheckpointManager(run) as manager:
        manager.save(5, {"model": _model(seed)})
        manager.wait_until_finished()
        return manager.all_steps()


def save_large(environ: Mapping[str, str], path: str, num_layers: int) -> None:
    """Saves layers of 40 MB by rows, one tensor of 8 MB by columns, and small ones."""
    os.environ.update(environ)
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, torch.Tensor] = {
        "inner": distribute_tensor(torch.randn(2000, 1000), mesh, [Shard(1)])
    }
    for number in range(num_layers):
        whole = torch.randn(9999, 1000)
        state[f"{number}.weight"] = distribute_tensor(whole, mesh, [Shard(0)])
        state[f"{number}.norm"] = distribute_tensor(torch.randn(1000), mesh, [Shard(0)])
    fc.save(path, {"model": state}, process_group=dist.group.WORLD)


def fill(near: str, far: str, num_steps: int) -> tuple[list[int], list[int]]:
    """Saves more than fits into the first tier; returns the steps of all tiers, and its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)]) as manager:
        for step in range(num_steps):
            value = distribute_tensor(torch.full((200, 1000), float(step)), mesh, [Shard(0)])
            manager.save(step, {"tree": {"w": value}}).result()
            manager.wait_until_finished()
        return manager.all_steps(), [info.step for info in manager._steps.infos]


def restore(environ: Mapping[str, str], run: str, seed: int) -> bool:
    """Restores them into another number of shards; whether all is as it was."""
    os.environ.update(environ)
    model, expected = _model(seed + 1), _model(seed)
    with fc.CheckpointManager(run) as manager:
        manager.restore(5, {"model": model})
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)


def roll_back(
    near: str, far: str, staging: fc.Eager | fc.Blocking
) -> tuple[list[int], int | None, list[int], str]:
    """Rolls back twice; returns the steps after a save and after discarding the later ones."""
    tiers = [fc.Tier(path=far)]
    with fc.CheckpointManager(near, tiers=tiers, staging=staging) as manager:

        def save(step: int) -> None:
            manager.save(step, {"tree": {"w": torch.full((4,), float(step))}})
            manager.wait_until_finished()

        for step in (10, 20, 30):
            save(step)
        manager.restore(10)
        save(11)
        after_save, latest = manager.all_steps(), manager.latest_step()
        error = ""
        try:
            manager.restore(10, discard_later=dist.get_rank() == 0)
        except fc.CheckpointError as failure:
            error = str(failure)
        manager.restore(10, discard_later=True)
        after_discard = manager.all_steps()
        save(20)
    return after_save, latest, after_discard, error


def save_state_dict(environ: Mapping[str, str], path: str) -> bool:
    """Saves a sharded tensor with PyTorch's API; whether other shards of it are loaded."""
    import torch.distributed.checkpoint as dcp

    from functional_ckpt.interop.dcp import Reader, Writer

    os.environ.update(environ)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(35.0).view(7, 5)
    dcp.save({"x": {"w": distribute_tensor(full, mesh, [Shard(0)])}}, storage_writer=Writer(path))
    wanted = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])
    dcp.load({"x": {"w": wanted}}, storage_reader=Reader(path))
    return torch.equal(wanted.full_tensor(), full)


def upload(
    environs: Sequence[Mapping[str, str]], near: str, far: str, values: torch.Tensor, dies: int
) -> float:
    """Saves and uploads step 7; returns the seconds of the upload.

    Rank `dies` is killed once it has sent a file.
    """
    rank = dist.get_rank()
    os.environ.update(environs[rank])
    if rank == dies:
        put_file = ObjectStorage.put_file

        def put_and_die(*args: Any) -> None:
            put_file(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(ObjectStorage, "put_file", put_and_die)  # noqa: B010
    seconds: list[float] = []

    def on_event(event: fc.Event) -> None:
        if event.kind == "uploaded":
            seconds.append(event.seconds or 0.0)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)], on_event=on_event) as manager:
        parts = {str(n): distribute_tensor(part, mesh, [Shard(0)]) for n, part in enumerate(values)}
        manager.save(7, {"tree": parts})
    return sum(seconds)
