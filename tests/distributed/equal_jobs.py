"""Values under one name on several ranks, equal or not: jobs for worker processes."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import functional_ckpt as fc


def differing(what: str) -> dict[str, Any]:
    """Items of which the ranks hold different values under one name."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    if what == "tensor parallel":  # every rank has its own rows as a plain tensor
        model = torch.nn.Linear(4, 3, bias=False)
        torch.nn.init.constant_(model.weight, rank + 1.0)
        return {"state": model}
    if what == "experts":  # rank 0 has experts 0 and 1, rank 1 has 2 and 3 under the same names
        experts = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
        for number, expert in enumerate(experts):
            torch.nn.init.constant_(expert.weight, 10.0 * rank + number)
        return {"state": torch.nn.ModuleDict({"experts": torch.nn.ModuleList(experts)})}
    if what == "moments":
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        (model(torch.ones(2, 4)).sum() * (rank + 1)).backward()
        optimizer.step()
        # AdamW's first step is the same whatever the gradient's size: only the moments differ.
        return {"state": fc.Optimizer(optimizer, model)}
    if what == "large":
        return {"state": {"w": torch.zeros(300, 500) + rank}}
    if what == "numpy":
        return {"state": {"w": torch.full((3,), rank).numpy()}}
    if what == "bytes":
        return {"state": {"w": b"%d" % rank}}
    if what == "buffer":
        model = torch.nn.Linear(2, 2)
        model.register_buffer("scale", torch.full((2,), float(rank)))
        return {"state": model}
    if what == "other trees":  # as pipeline stages, with one leaf in common
        return {"state": {"shared": torch.full((3,), rank), f"own{rank}": torch.ones(2)}}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if what == "replicas":
        local = torch.full((4,), float(rank))
        return {"state": {"w": DTensor.from_local(local, mesh, [Replicate()], run_check=False)}}
    # Meshes that have no rank in common are replicas of each other.
    assert what == "meshes"
    alone = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))["b"]
    local = torch.full((4,), float(rank))
    return {"state": {"w": DTensor.from_local(local, alone, [Shard(0)], run_check=False)}}


def save(directory: Path, items: dict[str, Any], **options: Any) -> None:
    with fc.CheckpointManager(directory, **options) as manager:
        handle = manager.save(0, items)
        assert handle is not None
        handle.result(60)


def save_differing(directory: Path, what: str, options: dict[str, Any]) -> None:
    save(directory, differing(what), **options)


def save_all_differing(directory: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    """One manager, one try of each kind; the error of each."""
    found: dict[str, str] = {}
    with fc.CheckpointManager(directory) as manager:
        for step, what in enumerate(kinds):
            try:
                manager.save(step, differing(what))
            except fc.errors.CoordinationError as error:
                found[what] = f"{error.key_path} {error.ranks} {error}"
        assert manager.all_steps() == []
        # The ranks still agree.
        handle = manager.save(100, {"state": {"w": torch.ones(3)}})
        assert handle is not None and handle.result(60) == 100
    return found


class One(NamedTuple):
    """A tuple of one field."""

    one: int


class Other(NamedTuple):
    """A tuple of another field."""

    other: int


def conflicting(what: str, rank: int) -> Any:
    """A tree of which two ranks hold different structures under one name."""
    w = torch.zeros(3)
    return {
        "tensor or text": (w, "text"),
        "tensor or None": (w, None),
        "text or dict": ("text", {}),
        "list or dict": ([w], {"0": w}),
        "list or tuple": ([1], (1,)),
        "dict or OrderedDict": ({"v": 1}, collections.OrderedDict(v=1)),
        "longer list": (["a"], ["a", "b"]),
        "tensor or ndarray": (w, w.numpy()),
        "other dtype": (w.double(), w),
        "carried dtype": (w.to(torch.float8_e5m2), w.to(torch.float8_e4m3fn)),
        "other dims": (w, w[None]),
        "tied or not": ([w, w], [w, w.clone()]),
        "other field": (One(one=1), Other(other=1)),
    }[what][rank]


def save_all_conflicting(directory: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    """One manager, one `save` of each kind; the error of each."""
    rank = dist.get_rank()
    found: dict[str, str] = {}
    with fc.CheckpointManager(directory) as manager:
        for step, what in enumerate(kinds):
            tree = {"own": {f"own{rank}": 1}, "x": conflicting(what, rank)}
            try:
                manager.save(step, {"state": fc.PyTree(tree, replicated="unchecked")})
            except fc.errors.CoordinationError as error:
                found[what] = f"{error.ranks} {error}"
        # Values and keys of dicts may differ, and a tree that is known already may change.
        handle = manager.save(100, {"state": {"x": [str(rank), 1], "y": {str(rank): None}}})
        assert handle is not None and handle.result(60) == 100
        try:
            manager.save(101, {"state": {"x": [str(rank), 1][rank:], "y": {str(rank): None}}})
        except fc.errors.CoordinationError as error:
            found["later"] = f"{error.ranks} {error}"
        assert manager.all_steps() == [100]
    return found


def drift(directory: Path, at: int, num_leaves: int) -> int | None:
    """Equal at first; one leaf of one rank changes at a save. The save at which that is found."""
    tree = {f"w{number:03}": torch.full((5,), float(number)) for number in range(num_leaves)}
    with fc.CheckpointManager(directory) as manager:
        for step in range(at + 20):
            if step == at and dist.get_rank() == 1:
                tree["w007"][3] += 1
            try:
                manager.save(step, {"tree": tree})
            except fc.errors.CoordinationError as error:
                assert error.key_path == "tree.w007", error
                assert error.ranks == (1,)
                return step
    return None


def save_per_rank(directory: Path) -> list[bool]:
    """The alternatives for per-rank values."""
    rank = dist.get_rank()
    model = torch.nn.Linear(4, 3)
    torch.nn.init.constant_(model.weight, rank + 1.0)
    optimizer = torch.optim.AdamW(model.parameters())
    (model(torch.ones(2, 4)).sum() * (rank + 1)).backward()
    optimizer.step()
    tree = {"w": torch.full((3,), rank), "l": [rank, b"%d" % rank]}

    def items(model: Any, optimizer: Any, tree: Any) -> dict[str, Any]:
        return {
            "model": fc.Stateful(model, per_rank=True),
            "optimizer": fc.Stateful(optimizer, per_rank=True),
            "tree": fc.PyTree(tree, per_rank=True),
            "name": fc.Json({"name": f"rank {rank}"}, replicated="unchecked"),
        }

    save(directory, items(model, optimizer, tree))
    other = torch.nn.Linear(4, 3)
    again = torch.optim.AdamW(other.parameters())
    empty = {"w": torch.zeros(3, dtype=torch.int64), "l": [0, b""]}
    with fc.CheckpointManager(directory, read_only=True) as manager:
        restored = manager.restore(0, items(other, again, empty))
    moments = [o.state[p]["exp_avg"] for o, p in ((optimizer, model.weight), (again, other.weight))]
    return [
        torch.equal(model.weight, other.weight),
        torch.equal(*moments),
        restored["tree"]["w"].tolist() == [rank] * 3,
        restored["tree"]["l"] == tree["l"],
        restored["name"] == {"name": "rank 0"},
    ]


def save_unchecked(directory: Path, staging: Any) -> None:
    """Many differing leaves: all of them must be one rank's, not a mixture."""
    rank = dist.get_rank()
    tree = {f"w{number}": torch.full((7, number), rank) for number in range(20)}
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    local = torch.full((4,), float(rank))
    tree["sharded"] = DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)
    save(directory, {"t": fc.PyTree(tree, replicated="unchecked")}, staging=staging)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def save_batch_norm(directory: Path, wrapper: str) -> list[Any]:
    """Statistics of each rank's own batches, beside parameters that are equal."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model: torch.nn.Module = inner
    if wrapper == "ddp":
        inner.register_buffer("seen", torch.zeros(()))
        model = torch.nn.parallel.DistributedDataParallel(inner)
    model(torch.randn(8, 2) + 10 * rank).sum().backward()
    if wrapper == "ddp":
        inner.get_buffer("seen").fill_(rank)
    log = _Records()
    logging.getLogger("functional_ckpt").addHandler(log)
    try:
        with fc.CheckpointManager(directory) as manager:
            for step in range(3):
                manager.save(step, {"model": model})
    finally:
        logging.getLogger("functional_ckpt").removeHandler(log)
    norm: Any = inner[1]
    return [norm.running_mean.tolist(), norm.running_var.tolist(), log.texts]


def save_json(directory: Path, kind: str) -> None:
    rank = dist.get_rank()
    if kind == "differs":
        save(directory, {"config": fc.Json({"lr": rank})})
    elif kind == "json or tree":
        save(directory, {"config": fc.Json({"lr": 1}) if rank == 0 else {"lr": torch.ones(())}})
    elif kind == "per rank or not":
        save(directory, {"config": fc.PyTree({"lr": 1}, per_rank=rank == 0)})
    elif kind == "shape":
        save(directory, {"config": {"lr": torch.ones(3 + rank)}})
    elif kind == "number or array":
        save(directory, {"config": {"lr": torch.ones(()) if rank else 1.0}})
    else:
        assert kind == "replicated"
        tree = {"lr": torch.ones(3)}
        save(directory, {"config": fc.PyTree(tree, replicated=("checked", "unchecked")[rank])})
