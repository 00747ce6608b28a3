"""Tensors that cannot be saved or filled as they are: jobs for worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import functional_ckpt as fc

aten: Any = torch.ops.aten


class Doubled(torch.Tensor):
    """A wrapper with `__tensor_flatten__`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Doubled:
        make: Any = torch.Tensor._make_wrapper_subclass
        wrapper = make(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.view.default, aten.alias.default):
            return cls(args[0].inner)
        raise NotImplementedError(func)


class Closed(Doubled):
    """A wrapper that does not."""

    __tensor_flatten__ = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def ragged(rows: tuple[int, ...], fill: float | None = None) -> DTensor:
    """Rows of one tensor, as many on each rank as it says."""
    mesh, rank = init_device_mesh("cpu", (len(rows),)), dist.get_rank()
    whole = torch.arange(sum(rows) * 2.0).reshape(sum(rows), 2)
    local = whole[sum(rows[:rank]) :][: rows[rank]].clone()
    if fill is not None:
        local.fill_(fill)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def odd(kind: str) -> Any:
    """A leaf that is refused."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    if kind == "replica":
        local = torch.ones(4 - rank)
        place = [Replicate()]
        return DTensor.from_local(local, mesh, place, run_check=False, shape=(4,), stride=(1,))
    if kind == "over wrapper":
        return DTensor.from_local(Doubled(torch.ones(2, 4)), mesh, [Shard(0)], run_check=False)
    if kind == "over shards":
        from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

        parts = [torch.ones(2, 2), torch.ones(3, 2)] if rank == 0 else [torch.ones(3, 2)]
        offsets = [(0, 0), (2, 0)] if rank == 0 else [(5, 0)]
        local: Any = LocalShardsWrapper(parts, offsets)
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=(8, 2), stride=(2, 1)
        )
    if kind == "sharded tensor":
        from torch.distributed._shard import sharded_tensor
        from torch.distributed._shard.sharding_spec import ChunkShardingSpec

        spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
        return sharded_tensor.ones(spec, 4, 2)
    if kind == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return torch.ones(3)
    assert kind == "closed"
    return Closed(torch.ones(3))


class Holder(torch.nn.Module):
    """A module whose state dict has the leaf."""

    def __init__(self, leaf: Any) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))
        self.leaf = leaf

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "t"] = self.leaf


def save_ragged(directory: Path, rows: tuple[int, ...], options: dict[str, Any]) -> None:
    with fc.CheckpointManager(directory, **options) as manager:
        manager.save(0, {"s": {"t": ragged(rows)}})


def save_odd(directory: Path, kind: str, in_module: bool) -> None:
    leaf = odd(kind)
    state: Any = Holder(leaf) if in_module else {"w": torch.ones(2), "t": leaf}
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {"s": state})


def restore_odd(directory: Path, rows: tuple[int, ...], fill: bool) -> None:
    """Into a tensor of other parts than were saved; the others stay as they are."""
    tensor = ragged(rows, -1.0)
    other = torch.full((3,), -1.0)
    items = {"s": {"t": fc.handlers.Fill(tensor) if fill else tensor, "w": fc.handlers.Fill(other)}}
    try:
        with fc.CheckpointManager(directory, read_only=True) as manager:
            manager.restore(0, items)
    finally:
        assert (tensor.to_local() == -1).all() and (other == -1).all()


def restore_into_kind(directory: Path, kind: str) -> None:
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(0, {"s": {"t": odd(kind), "w": torch.zeros(3)}})


def save_redistributed(directory: Path) -> None:
    """A redistribution that nothing has waited for yet."""
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    gathered = tensor.redistribute(placements=[Replicate()], async_op=True)
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {"s": {"t": gathered}})
