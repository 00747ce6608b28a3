"""Models under FSDP2, TP, HSDP, DDP and ZeRO-1 resume exactly, on other numbers of ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import functional_ckpt as fc

NUM_BEFORE, NUM_AFTER = 3, 5
# Meshes by name. "alone" is no group at all.
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "fsdp4": ((4,), ("dp",)),
    "fsdp2": ((2,), ("dp",)),
    "fsdp3": ((3,), ("dp",)),
    "fsdp6": ((6,), ("dp",)),
    "fsdp2_tp2": ((2, 2), ("dp", "tp")),
    "hsdp2x2": ((2, 2), ("replicate", "dp")),
    "one": ((1,), ("dp",)),
}


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(7, 10)
        self.down = nn.Linear(10, 5)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("counts", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x)))) * self.scale


def spread(name: str) -> nn.Module:
    shape, names = MESHES[name]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = Net()
    if "tp" in names:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    fully_shard(model.up, mesh=mesh["dp"] if "tp" in names else mesh)
    fully_shard(model, mesh=mesh["dp"] if "tp" in names else mesh)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for name, p in model.named_parameters() if "weight" in name]
    others = [p for name, p in model.named_parameters() if "weight" not in name]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 0.05}]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    # The same batch on every rank, so that results do not depend on their number.
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).pow(3).mean().backward()
    optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": whole(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def train_and_save(directory: Path, mesh: str) -> dict[str, dict[str, torch.Tensor]]:
    """Saves in the middle, and does not stop."""
    model = spread(mesh)
    optimizer = make_optimizer(model)
    for number in range(NUM_BEFORE):
        step(model, optimizer, number)
    found = {"saved": weights(model), "moments": moments(model, optimizer)}
    with fc.CheckpointManager(directory) as manager:
        items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
        assert manager.save(NUM_BEFORE, items)
        for number in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
            step(model, optimizer, number)
    return found | {"end": weights(model)}


def restore_and_train(directory: Path, mesh: str, used: bool) -> dict[str, dict[str, torch.Tensor]]:
    model = spread(mesh)
    optimizer = make_optimizer(model)
    if used:  # existing state is filled in place
        step(model, optimizer, 99)
    owned = {name: id(parameter) for name, parameter in model.named_parameters()}
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(None, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    assert owned == {name: id(parameter) for name, parameter in model.named_parameters()}
    found = {"saved": weights(model), "moments": moments(model, optimizer)}
    for number in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
        step(model, optimizer, number)
    return found | {"end": weights(model)}


def num_ranks(mesh: str) -> int:
    return math.prod(MESHES[mesh][0])


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        ("fsdp4", "fsdp2"),
        ("fsdp4", "one"),
        ("fsdp2", "fsdp4"),
        ("fsdp2_tp2", "fsdp2"),
        ("fsdp2_tp2", "hsdp2x2"),
        ("hsdp2x2", "fsdp3"),
        ("fsdp6", "fsdp2_tp2"),
        ("one", "fsdp2_tp2"),
    ],
)
def test_training_resumes_exactly_on_other_ranks(
    saved: str, restored: str, workers: Workers, tmp_path: Path
) -> None:
    never_stopped = workers.run(num_ranks(saved), train_and_save, tmp_path, saved)[0]
    assert len(never_stopped["moments"]) == 3 * 7
    # Half of the runs start with an optimizer that has state already.
    used = restored.startswith("fsdp2")
    for found in workers.run(num_ranks(restored), restore_and_train, tmp_path, restored, used):
        assert_same_bits(found["saved"], never_stopped["saved"])
        assert_same_bits(found["moments"], never_stopped["moments"])
        for name, tensor in never_stopped["end"].items():
            torch.testing.assert_close(found["end"][name], tensor, rtol=1e-4, atol=1e-5)
            assert name == "counts" or not torch.equal(tensor, never_stopped["saved"][name])


@pytest.mark.parametrize("saved", ["fsdp4", "fsdp2_tp2"])
def test_one_process_restores_a_plain_model(saved: str, workers: Workers, tmp_path: Path) -> None:
    never_stopped = workers.run(num_ranks(saved), train_and_save, tmp_path, saved)[0]
    model = Net()
    optimizer = make_optimizer(model)
    step_path = tmp_path / str(NUM_BEFORE)
    fc.restore(step_path, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    assert_same_bits(weights(model), never_stopped["saved"])
    assert_same_bits(moments(model, optimizer), never_stopped["moments"])
    for number in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
        step(model, optimizer, number)
    for name, tensor in never_stopped["end"].items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ meta device


def restore_from_meta(directory: Path) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model)
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(None, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    restored = weights(model)
    moments = [entry["exp_avg"] for entry in optimizer.state.values()]
    assert moments and all(isinstance(moment, DTensor) for moment in moments)
    step(model, optimizer, NUM_BEFORE)  # FSDP's own view of its parameters is sound
    return restored


def test_a_sharded_model_on_the_meta_device_is_materialised(
    workers: Workers, tmp_path: Path
) -> None:
    saved = workers.run(4, train_and_save, tmp_path, "fsdp4")[0]["saved"]
    for found in workers.run(2, restore_from_meta, tmp_path):
        assert_same_bits(found, saved)


class App:
    """An object whose state holds DTensors, as in the tutorial of torch.distributed.checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kinds = model, set[str]()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "epochs": [1, 2]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["epochs"] == [1, 2]
        self.kinds = {type(value).__name__ for value in state["model"].values()}
        self.model.load_state_dict(state["model"])


def restore_stateful(directory: Path) -> tuple[bool, set[str]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apps = [App(fully_shard(Net(), mesh=mesh)) for _ in range(2)]
    with fc.CheckpointManager(directory) as manager:
        manager.save(1, {"app": apps[0]})
        manager.restore(1, {"app": apps[1]})
    whole, found = (weights(app.model) for app in apps)
    return all(torch.equal(found[name], whole[name]) for name in whole), apps[1].kinds


def test_a_stateful_object_gets_its_dtensors_back(workers: Workers, tmp_path: Path) -> None:
    for is_equal, kinds in workers.run(2, restore_stateful, tmp_path):
        assert is_equal and kinds == {"DTensor", "Tensor"}  # buffers are not sharded


# ------------------------------------------------------------------------------------ DDP, ZeRO-1


def ddp(optimizer_of: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.parallel.DistributedDataParallel(Net())
    return model, optimizer_of(model)


def save_ddp(directory: Path) -> dict[str, torch.Tensor]:
    model, optimizer = ddp(make_optimizer)
    for number in range(NUM_BEFORE):
        step(model, optimizer, number)
    with fc.CheckpointManager(directory) as manager:
        items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
        assert manager.save(NUM_BEFORE, items)
    return weights(model.module)


def test_ddp_restores_as_fsdp(workers: Workers, tmp_path: Path) -> None:
    saved = workers.run(2, save_ddp, tmp_path)[0]
    for found in workers.run(3, restore_and_train, tmp_path, "fsdp3", False):
        assert_same_bits(found["saved"], saved)


def zero(model: nn.Module) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns while it is imported

    return ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.02, weight_decay=0.1
    )


def save_zero(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    model, optimizer = ddp(zero)
    for number in range(NUM_BEFORE):
        step(model, optimizer, number)
    saved = copy.deepcopy(weights(model.module))
    with fc.CheckpointManager(directory) as manager:
        items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
        handle = manager.save(NUM_BEFORE, items)
        assert handle is not None
        handle.result(60)
    cast("Any", optimizer).consolidate_state_dict(to=0)  # torch's own way to the full state
    state = optimizer.state_dict() if dist.get_rank() == 0 else {"state": {}}
    names = [name for name, _ in model.module.named_parameters()]
    exp_avg = {names[key]: entry["exp_avg"].clone() for key, entry in state["state"].items()}
    for number in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
        step(model, optimizer, number)
    return {"saved": saved, "exp_avg": exp_avg, "end": weights(model.module)}


def restore_zero(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    model, optimizer = ddp(zero)
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(None, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    saved = weights(model.module)
    for number in range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER):
        step(model, optimizer, number)
    return {"saved": saved, "end": weights(model.module)}


@pytest.mark.parametrize("num_restored", [1, 2, 3])
def test_zero_redundancy_optimizer_resumes_exactly(
    num_restored: int, workers: Workers, tmp_path: Path
) -> None:
    never_stopped = workers.run(2, save_zero, tmp_path)[0]
    stored = fc.restore(tmp_path / str(NUM_BEFORE))["optimizer"]
    assert {name: entry["exp_avg"].shape for name, entry in stored["state"].items()} == {
        name: tensor.shape for name, tensor in never_stopped["exp_avg"].items()
    }
    for name, tensor in never_stopped["exp_avg"].items():
        assert torch.equal(stored["state"][name]["exp_avg"], tensor), name
    for found in workers.run(num_restored, restore_zero, tmp_path):
        assert_same_bits(found["saved"], never_stopped["saved"])
        for name, tensor in never_stopped["end"].items():
            torch.testing.assert_close(found["end"][name], tensor, rtol=1e-4, atol=1e-5)
