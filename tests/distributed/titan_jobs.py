"""Training with torchtitan's containers as items: jobs for workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset

import functional_ckpt as fc


class Numbers(IterableDataset[torch.Tensor]):
    """A stream that knows its position, as torchtitan's text data sets do."""

    def __init__(self, rank: int) -> None:
        self.rank, self.position = rank, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            seed = 1000 * self.rank + self.position
            yield torch.randn(6, generator=torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Training:
    """The items of torchtitan's trainer."""

    def __init__(self, seed: int) -> None:
        from torchtitan.components.checkpointer.base import ModelWrapper
        from torchtitan.components.dataloader import ParallelAwareDataloader
        from torchtitan.components.optimizer import (
            LRSchedulersContainer,
            OptimizersContainer,
            ParamGroupConfig,
        )

        torch.manual_seed(seed)
        parts = [torch.nn.Linear(6, 10), torch.nn.Linear(10, 3)]
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in parts:
            fully_shard(part, mesh=mesh)
        self.parts: list[Any] = list(parts)
        groups = [
            ParamGroupConfig(pattern="bias", optimizer_name="Adam", optimizer_kwargs={"lr": 0.1}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.05}),
        ]
        # Each part has its own names, as stages of a pipeline have.
        named = torch.nn.ModuleDict({"up": parts[0], "down": parts[1]})
        config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        self.optimizers = OptimizersContainer(config, model_parts=[named])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=20)
        rank, size = dist.get_rank(), dist.get_world_size()
        loader: Any = ParallelAwareDataloader
        self.loader = loader(Numbers(rank), dp_rank=rank, dp_world_size=size, batch_size=4)
        self.batches: Iterator[torch.Tensor] | None = None
        self.items = {
            "model": ModelWrapper(named),
            "optimizer": self.optimizers,
            "lr_scheduler": self.schedulers,
            "dataloader": self.loader,
        }

    def train(self, num_steps: int) -> None:
        if self.batches is None:
            self.batches = iter(self.loader)
        for _ in range(num_steps):
            self.optimizers.zero_grad()
            hidden = self.parts[0](next(self.batches)).relu()
            self.parts[1](hidden).pow(2).mean().backward()
            self.optimizers.step()
            self.schedulers.step()

    def values(self) -> list[Any]:
        """Returns the sharded state of the model and the optimizers, and the learning rates."""
        found: list[Any] = []
        for value in (*self.items["model"].state_dict().values(), *_states(self.optimizers)):
            found.append((value.to_local() if isinstance(value, DTensor) else value).tolist())
        rates = [group["lr"] for each in self.optimizers for group in each.param_groups]
        return [*found, rates]


def _states(optimizers: Any) -> Iterator[Any]:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from state.values()


def uninterrupted(directory: str) -> list[Any]:
    """Saves on the way; returns the values at the end."""
    run = Training(0)
    run.train(3)
    with fc.CheckpointManager(directory) as manager:
        manager.save(3, run.items)
    run.train(3)
    return run.values()


def resumed(directory: str) -> list[Any]:
    """Restores into objects of other values and trains again."""
    run = Training(1)
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(3, into=run.items)
    placed = [type(value) for value in run.items["model"].state_dict().values()]
    assert placed == [DTensor] * len(placed)
    run.train(3)
    return run.values()


def resharded(directory: str) -> list[Any]:
    """Restores all but the data on another number of ranks; returns the full weights."""
    run = Training(1)
    items = {name: item for name, item in run.items.items() if name != "dataloader"}
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(3, into=items)
    weights: Any = run.items["model"].state_dict().values()
    return [value.full_tensor().tolist() for value in weights]
