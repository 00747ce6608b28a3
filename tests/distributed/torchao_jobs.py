"""torchao's quantized weights and low-bit optimizers under FSDP2: jobs for workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import functional_ckpt as fc

torch.compiler.set_stance("force_eager")


def sharded(seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(name: str, model: Any) -> Any:
    import torchao.optim

    return getattr(torchao.optim, name)(model.parameters(), lr=1e-2)


def save(directory: str, items: Any) -> None:
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, items)


def restore(directory: str, items: Any) -> None:
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(into=items)


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        seed = 10 * step + dist.get_rank()
        batch = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()


def parts(value: Any) -> Iterator[torch.Tensor]:
    """Yields the plain tensors of which a rank's part of a tensor consists."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from parts(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value.detach().contiguous()


def bits(model: Any, optimizer: Any = None) -> list[Any]:
    values = list(model.state_dict().values())
    for state in optimizer.state.values() if optimizer is not None else ():
        values += state.values()
    return [
        (str(part.dtype), part.reshape(-1).view(torch.uint8).tolist())
        for value in values
        for part in parts(value)
    ]


def trained(directory: str, name: str) -> tuple[list[Any], list[Any]]:
    """Saves on the way; returns the bits that were saved, and those at the end."""
    model = sharded(0)
    optimizer = optimizer_of(name, model)
    train(model, optimizer, range(3))
    saved = bits(model, optimizer)
    save(directory, {"model": model, "optimizer": optimizer})
    train(model, optimizer, range(3, 5))
    return saved, bits(model, optimizer)


def resumed(directory: str, name: str, is_used: bool) -> tuple[list[Any], list[Any]]:
    model = sharded(1)
    optimizer = optimizer_of(name, model)
    if is_used:
        train(model, optimizer, range(7, 8))
    restore(directory, {"model": model, "optimizer": optimizer})
    restored = bits(model, optimizer)
    train(model, optimizer, range(3, 5))
    return restored, bits(model, optimizer)


def quantized(seed: int, config: str) -> Any:
    """Returns a model with quantized weights, sharded by hand: torchao has no split of them."""
    import torchao.quantization as ao

    torch.manual_seed(seed + 10 * dist.get_rank())
    model: Any = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    for bias in (model[0].bias, model[2].bias):
        nn.init.constant_(bias, seed)
    model.requires_grad_(requires_grad=False)
    ao.quantize_(model, getattr(ao, config)())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        weight = DTensor.from_local(layer.weight, mesh, [Shard(0)], run_check=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def saved_weights(directory: str, config: str) -> list[Any]:
    model = quantized(0, config)
    save(directory, {"model": model})
    return bits(model)


def restored_weights(directory: str, config: str) -> list[Any]:
    model = quantized(1, config)
    before = bits(model)
    restore(directory, {"model": model})
    assert bits(model) != before
    return bits(model)
