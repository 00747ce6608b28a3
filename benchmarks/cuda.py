"""The same questions on a GPU: saves against the copy over the bus, restores likewise."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import async_peers, files, meters, workloads
from benchmarks.loop import steps_between

__all__ = ["SYSTEMS", "measure", "measure_system"]

SYSTEMS: Mapping[str, Callable[[], async_peers.AsyncPeer]] = {
    "eager": async_peers.OursEager,
    "overlapped": async_peers.OursOverlapped,
    "dcp_pinned": async_peers.DcpPinned,
    "dcp_pinned_overlapped": async_peers.DcpPinnedOverlapped,
}
_SIDE = 8192


def measure(workload: str, divisor: int, root: str) -> dict[str, Any]:
    """Seconds of the copies over the bus, blocked in save, restored, and of a loop that saves."""
    if not torch.cuda.is_available():
        raise async_peers.SkipMeasure("there is no GPU")
    host = workloads.make(workload, divisor)
    state = {name: tensor.cuda() for name, tensor in host.items()}
    figures: dict[str, Any] = {
        "size_bytes": sum(tensor.nbytes for tensor in host.values()),
        "device": torch.cuda.get_device_name(),
    }
    figures |= _bus(host, state)
    for name, make in SYSTEMS.items():
        path = os.path.join(root, name)
        os.makedirs(path)
        try:
            found = measure_system(make(), state, path)
        except async_peers.SkipMeasure:
            continue
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        files.fresh(path)
    return figures


def _bus(host: workloads.State, device: workloads.State) -> dict[str, float]:
    """Both ways, with pinned memory that is there already."""
    pinned = {name: torch.empty_like(tensor, pin_memory=True) for name, tensor in host.items()}

    def to_host() -> None:
        for name, tensor in pinned.items():
            tensor.copy_(device[name], non_blocking=True)

    def to_device() -> None:
        for name, tensor in pinned.items():
            device[name].copy_(tensor, non_blocking=True)

    return {
        "pinned_d2h_seconds": min(_timed(to_host) for _ in range(3)),
        "pinned_h2d_seconds": min(_timed(to_device) for _ in range(3)),
    }


def measure_system(
    peer: async_peers.AsyncPeer, state: workloads.State, path: str
) -> dict[str, float]:
    """The figures of one system, in an empty directory."""
    figures: dict[str, float] = {}
    expected = _digest(state)
    peer.start(state, path)
    for step in range(3):
        torch.cuda.synchronize()
        blocked = meters.seconds(lambda step=step: peer.save(step))
        fence = meters.seconds(peer.fence)
        durable = blocked + fence + meters.seconds(lambda step=step: _wait(peer, step))
        figures[f"blocked_{step + 1}_seconds"] = blocked
        if peer.is_overlapped:
            figures[f"fence_{step + 1}_seconds"] = fence
        figures[f"durable_{step + 1}_seconds"] = durable
    for tensor in state.values():
        tensor.zero_()
    files.fill_cache(async_peers.step_path(path, 2))
    figures["restore_warm_seconds"] = _timed(lambda: peer.restore(2))
    if _digest(state) != expected:
        raise RuntimeError("the bytes restored are not those that were saved")
    step = _training_step(peer)
    count = steps_between(figures["durable_3_seconds"], _timed(lambda: step(None)))
    figures["loop_alone_seconds"] = _timed(lambda: _loop(step, count))
    figures["loop_saving_seconds"] = _timed(lambda: _loop(step, count, peer))
    peer.wait()
    peer.close()
    return figures


def _wait(peer: async_peers.AsyncPeer, step: int) -> None:
    peer.wait()
    if not peer.is_durable:
        files.sync_tree(async_peers.step_path(peer.root, step))


def _loop(
    step: Callable[[async_peers.AsyncPeer | None], None],
    count: int,
    saving: async_peers.AsyncPeer | None = None,
) -> None:
    """Saves before the first step, which is the one that waits for the fence."""
    if saving is not None:
        saving.save(10)
    step(saving)
    for _ in range(count - 1):
        step(None)


def _training_step(
    peer: async_peers.AsyncPeer,
) -> Callable[[async_peers.AsyncPeer | None], None]:
    """Returns a step; its argument is the system whose save is not staged yet."""
    optimizer = peer.optimizer()
    first: torch.Tensor = optimizer.param_groups[0]["params"][0]
    factor = torch.rand(_SIDE, _SIDE, device=first.device, dtype=torch.bfloat16)
    gradient = torch.rand_like(first)

    def step(saving: async_peers.AsyncPeer | None) -> None:
        for _ in range(8):
            torch.mm(factor, factor)
        first.grad = gradient
        if saving is not None and not saving.fences_steps:
            saving.fence()
        optimizer.step()

    return step


def _digest(state: workloads.State) -> str:
    return workloads.digest({name: tensor.cpu() for name, tensor in state.items()})


def _timed(action: Callable[[], object]) -> float:
    """Until the device has done it, too."""

    def run() -> None:
        action()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return meters.seconds(run)
