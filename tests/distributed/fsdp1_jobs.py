"""FullyShardedDataParallel: jobs for worker processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817

import functional_ckpt as fc


def trained(use_orig_params: bool, seed: int, steps: int) -> tuple[Any, torch.optim.AdamW]:
    torch.manual_seed(seed)
    inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    model: Any = FSDP(inner, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def refused(directory: Path, use_orig_params: bool) -> list[str]:
    """The error of each way to save the optimizer's pieces."""
    warnings.simplefilter("ignore")
    model, optimizer = trained(use_orig_params, 0, 2)
    found: list[str] = []
    with fc.CheckpointManager(directory) as manager:
        for make in (
            lambda: fc.Optimizer(optimizer, model),
            lambda: fc.Optimizer(optimizer, model.named_parameters()),
            lambda: fc.Stateful(optimizer),
            lambda: dict(enumerate(model.parameters())),
        ):
            try:
                manager.save(0, {"model": model, "o": make()})
            except fc.errors.CheckpointError as error:
                found.append(f"{type(error).__name__}: {error}")
        assert manager.all_steps() == []
    return found


def goes_on(directory: Path, use_orig_params: bool) -> bool:
    """Whether training resumes exactly with the alternative that the error names."""
    warnings.simplefilter("ignore")
    options = dcp.StateDictOptions(full_state_dict=True)
    model, optimizer = trained(use_orig_params, 0, 3)
    with fc.CheckpointManager(directory) as manager:
        state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        manager.save(0, {"model": model, "optimizer": state})
    train(model, optimizer, range(3, 6))
    other, again = trained(use_orig_params, 1, 1)
    with fc.CheckpointManager(directory, read_only=True) as manager:
        restored = manager.restore(None, {"model": other, "optimizer": None})
    dcp.set_optimizer_state_dict(other, again, restored["optimizer"], options=options)
    train(other, again, range(3, 6))
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def own_pieces(directory: Path) -> bool:
    """Each rank's own pieces, for the same number of ranks."""
    warnings.simplefilter("ignore")
    optimizer, again = trained(False, 0, 3)[1], trained(False, 1, 1)[1]
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {"o": fc.Stateful(optimizer, per_rank=True)})
        manager.wait_until_finished()
        manager.restore(0, {"o": fc.Stateful(again, per_rank=True)})
    pairs = zip(optimizer.state.values(), again.state.values(), strict=True)
    return all(torch.equal(one["exp_avg"], two["exp_avg"]) for one, two in pairs)


class Stage(torch.nn.Module):
    """A layer of a pipeline; the first has no bias."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        torch.manual_seed(layer)
        self.add_module(f"layer{layer}", torch.nn.Linear(3, 3, bias=layer > 0))


def save_stage(directory: Path, with_empty: bool) -> None:
    """Pipeline stages, of which the first has nothing for the second group."""
    stage = Stage(torch.distributed.get_rank())
    named = dict(stage.named_parameters())
    biases = [p for name, p in named.items() if name.endswith("bias")]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named.items() if name.endswith("weight")], "weight_decay": 0.1}
    ]
    if biases or with_empty:
        groups.append({"params": biases, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    sum(p.sum() for p in named.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    with fc.CheckpointManager(directory) as manager:
        handle = manager.save(0, {"model": stage, "optimizer": fc.Optimizer(optimizer, stage)})
        assert handle is not None
        handle.result(60)
