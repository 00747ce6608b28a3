"""The same questions on a GPU: saves against the copy over the bus, restores likewise."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import async_peers, files, meters, peers, workloads
from benchmarks.loop import steps_between

__all__ = ["measure"]

_SIDE = 8192


def measure(workload: str, divisor: int, root: str) -> dict[str, Any]:
    """Seconds of the copies over the bus, blocked in save, restored, and of a loop that saves."""
    if not torch.cuda.is_available():
        raise async_peers.SkipMeasure("there is no GPU")
    host = workloads.make(workload, divisor)
    module = peers.Holder({name: tensor.cuda() for name, tensor in host.items()})
    figures: dict[str, Any] = {
        "size_bytes": sum(tensor.nbytes for tensor in host.values()),
        "device": torch.cuda.get_device_name(),
    }
    figures |= _bus(host, module)
    for name in ("eager", "overlapped"):
        try:
            options = async_peers.overlapped_option() if name == "overlapped" else {}
        except async_peers.SkipMeasure:
            continue
        path = os.path.join(root, name)
        found = _ours(module, path, options)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        files.fresh(path)
    return figures


def _bus(host: workloads.State, module: torch.nn.Module) -> dict[str, float]:
    """Both ways, with pinned memory that is there already."""
    pinned = {name: torch.empty_like(tensor, pin_memory=True) for name, tensor in host.items()}
    device = dict(module.named_parameters())

    def to_host() -> None:
        for name, tensor in pinned.items():
            tensor.copy_(device[name].detach(), non_blocking=True)

    def to_device() -> None:
        with torch.no_grad():
            for name, tensor in pinned.items():
                device[name].copy_(tensor, non_blocking=True)

    return {
        "pinned_d2h_seconds": min(_timed(to_host) for _ in range(3)),
        "pinned_h2d_seconds": min(_timed(to_device) for _ in range(3)),
    }


def _ours(module: torch.nn.Module, path: str, options: dict[str, Any]) -> dict[str, float]:
    import functional_ckpt as fc

    figures: dict[str, float] = {}
    expected = _digest(module)
    items, optimizer = async_peers.overlapped_items(module)
    with fc.CheckpointManager(path, keep_policy=fc.policies.LatestN(1), **options) as manager:
        for step in range(3):
            torch.cuda.synchronize()
            commits: list[Any] = []
            figures[f"blocked_{step + 1}_seconds"] = meters.seconds(
                lambda step=step, to=commits: to.append(manager.save(step, items))
            )
            if options:
                figures[f"fence_{step + 1}_seconds"] = _timed(manager.fence)
            durable = meters.seconds(commits[0].result)
            figures[f"durable_{step + 1}_seconds"] = (
                figures[f"blocked_{step + 1}_seconds"] + durable
            )
        _clear(module)
        figures["restore_warm_seconds"] = _timed(lambda: manager.restore(2, items))
        if _digest(module) != expected:
            raise RuntimeError("the bytes restored are not those that were saved")
        step = _training_step(module, optimizer)
        count = steps_between(figures["durable_3_seconds"], _timed(step))
        figures["loop_alone_seconds"] = _timed(lambda: _loop(step, lambda: None, count))
        saving = [10]

        def save() -> None:
            saving[0] += 1
            manager.save(saving[0], items)

        figures["loop_saving_seconds"] = _timed(lambda: _loop(step, save, count))
    return figures


def _loop(step: Callable[[], None], save: Callable[[], None], count: int) -> None:
    save()
    for _ in range(count):
        step()


def _training_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    parameters = list(module.parameters())
    factor = torch.rand(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    gradient = torch.rand_like(parameters[0])

    def step() -> None:
        for _ in range(8):
            torch.mm(factor, factor)
        parameters[0].grad = gradient
        optimizer.step()

    return step


def _digest(module: torch.nn.Module) -> str:
    return workloads.digest({name: p.detach().cpu() for name, p in module.named_parameters()})


def _clear(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def _timed(action: Callable[[], object]) -> float:
    """Until the device has done it, too."""

    def run() -> None:
        action()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return meters.seconds(run)
