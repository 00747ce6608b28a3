"""Values with handlers inside pytrees, and DTensors over tensor subclasses: jobs for workers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import functional_ckpt as fc

aten: Any = torch.ops.aten


class Codes(torch.Tensor):
    """Eight-bit codes with a scale, as low-bit optimizers keep their state."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Codes:
        make: Any = torch.Tensor._make_wrapper_subclass
        wrapper = make(cls, codes.shape, dtype=dtype)
        wrapper.codes, wrapper.scale = codes, scale
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], [self.dtype, self.shape]

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, size: Any, stride: Any) -> Codes:
        return cls(parts["codes"], parts["scale"], context[0])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0]
        copies = (aten.alias.default, aten._to_copy.default, aten.view.default)
        if func in (aten.detach.default, *copies):
            return cls(first.codes, first.scale, first.dtype)
        if func is aten.copy_.default:
            first.codes.copy_(args[1].codes)
            first.scale.copy_(args[1].scale)
            return first
        raise NotImplementedError(func)

    @classmethod
    def of(cls, value: torch.Tensor) -> Codes:
        scale = value.abs().max().clamp(min=1e-12) / 127
        return cls((value / scale).round().to(torch.int8), scale, value.dtype)

    def value(self) -> torch.Tensor:
        return self.codes * self.scale


class LowBit(torch.optim.Optimizer):
    """Momentum in eight bits; of a DTensor, a DTensor over such codes."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state: Any = self.state[p]
                local = p.to_local() if isinstance(p, DTensor) else p
                grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                old = state.get("m")
                codes = old._local_tensor if isinstance(old, DTensor) else old
                moment = grad if codes is None else 0.9 * codes.value() + grad
                new: Any = Codes.of(moment)
                if isinstance(p, DTensor):
                    shape = {"shape": p.shape, "stride": p.stride()}
                    mesh, cuts = p.device_mesh, p.placements
                    new = DTensor.from_local(new, mesh, cuts, run_check=False, **shape)
                state["m"] = new
                local.sub_(group["lr"] * moment)


def net(seed: int, *, meta: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.device("meta" if meta else "cpu"):
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def weights(*models: torch.nn.Module) -> list[list[float]]:
    found = [p for model in models for p in model.parameters()]
    return [p.full_tensor().flatten().tolist() for p in found if isinstance(p, DTensor)]


class AppState:
    """The class of PyTorch's tutorial on distributed checkpoints."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = dcp_state.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        dcp_state.set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def nested(seed: int, *, meta: bool = False) -> dict[str, Any]:
    g, d = net(seed, meta=meta), net(seed + 1, meta=meta)
    optimizers = [torch.optim.AdamW(each.parameters(), 0.05) for each in (g, d)]
    named = [fc.Optimizer(o, m) for o, m in zip(optimizers, (g, d), strict=True)]
    return {
        "optimizers": named,
        "nets": {"g": g, "d": d},
        "state": {"rng": random.Random(seed * 10 + dist.get_rank()), "rank": dist.get_rank()},
    }


def train_nested(tree: dict[str, Any], numbers: range) -> None:
    for name, item in zip(("g", "d"), tree["optimizers"], strict=True):
        train(tree["nets"][name], item.value, numbers)


def save_nested(directory: Path) -> tuple[Any, ...]:
    """Trains, saves after an evaluation, continues; returns the final weights."""
    tree = nested(0)
    train_nested(tree, range(2))
    with torch.no_grad():
        tree["nets"]["g"](torch.ones(2, 6))
    with fc.CheckpointManager(directory) as manager:
        manager.save(2, {"all": tree})
    train_nested(tree, range(2, 4))
    return weights(*tree["nets"].values()), tree["state"]["rng"].random()


def restore_nested(directory: Path, meta: bool, with_rng: bool) -> tuple[Any, ...]:
    tree = nested(5, meta=meta)
    options: Any = {} if with_rng else {"ignore": "all.state.*"}
    with fc.CheckpointManager(directory, read_only=True) as manager:
        restored = manager.restore(2, {"all": tree}, **options)["all"]
    assert restored["nets"]["g"] is tree["nets"]["g"]
    if with_rng:
        assert restored["state"]["rank"] == dist.get_rank()
    train_nested(tree, range(2, 4))
    return weights(*tree["nets"].values()), tree["state"]["rng"].random()


def app_state(directory: Path, low_bit: bool) -> list[list[float]]:
    """A stateful object, or a low-bit optimizer, restored into a fresh one and into a used one."""
    kind: Any = LowBit if low_bit else torch.optim.AdamW

    def items(seed: int, *, used: bool) -> tuple[Any, Any, Any]:
        model = net(seed)
        optimizer = kind(model.parameters())
        if used:
            train(model, optimizer, range(2))
        if low_bit:
            return model, optimizer, {"m": model, "o": fc.Optimizer(optimizer, model)}
        return model, optimizer, {"app": AppState(model, optimizer)}

    model, optimizer, saved = items(0, used=True)
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, saved)
    train(model, optimizer, range(2, 4))
    found: list[list[float]] = []
    for used in (False, True):
        other, its_optimizer, target = items(7, used=used)
        with fc.CheckpointManager(directory, read_only=True) as manager:
            manager.restore(0, target)
        states = [value for entry in its_optimizer.state.values() for value in entry.values()]
        assert any(isinstance(value, DTensor) for value in states)
        train(other, its_optimizer, range(2, 4))
        assert weights(other) == weights(model)
        found += weights(other)
    return found


def restore_low_bit(directory: Path) -> None:
    model = net(7)
    optimizer = LowBit(model.parameters())
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(0, {"m": model, "o": fc.Optimizer(optimizer, model)})
