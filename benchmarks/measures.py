"""The measurements of one system with one workload, in a separate process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import async_peers, files, meters, peers, workloads
from benchmarks.workloads import State

__all__ = ["NUM_SAVES", "UnequalWorkError", "measure_async", "measure_sync"]

NUM_SAVES = 3


class UnequalWorkError(Exception):
    """A system did not restore the bytes that it was to save; its figures would mean nothing."""


def measure_sync(
    peer_name: str, workload: str, divisor: int, root: str, rounds: int = 1
) -> list[dict[str, Any]]:
    """A save until written and until durable, and every way to restore it; repeated."""
    peer = peers.PEERS[peer_name]()
    _warm_up(peer, os.path.join(root, "warm"))
    state = workloads.make(workload, divisor)
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        found.append(_round_sync(peer_name, peer, state, os.path.join(root, "step")))
        files.fresh(os.path.join(root, "step"))
    return found


def _round_sync(peer_name: str, peer: peers.Peer, state: State, path: str) -> dict[str, Any]:
    expected = workloads.digest(state)
    bound = peer.bind(state)
    figures: dict[str, Any] = {
        "size_bytes": sum(tensor.nbytes for tensor in state.values()),
        "digest": expected,
    }
    cpu = meters.cpu_seconds()
    with meters.PeakMemory() as memory:
        seconds = meters.seconds(lambda: peer.save(bound, path))
        if peer.is_durable:
            figures["save_durable_seconds"] = seconds
        else:
            figures["save_seconds"] = seconds
            syncing = meters.seconds(lambda: files.sync_tree(path))
            figures["save_durable_seconds"] = seconds + syncing
    figures |= {
        "save_cpu_seconds": meters.cpu_seconds() - cpu,
        "save_peak_bytes": memory.peak,
        "disk_bytes": sum(files.inodes(path).values()),
        "num_files": len(list(files.walk_files(path))),
    }
    _clear(state)
    figures["after_save_resident"] = files.resident_fraction(path)
    figures["restore_after_save_seconds"] = meters.seconds(lambda: peer.restore(bound, path))
    _check(peer_name, state, expected)
    for temperature in ("warm", "cold"):
        _clear(state)
        prepare = files.drop_cache if temperature == "cold" else files.fill_cache
        figures[f"{temperature}_resident"] = prepare(path)
        cpu = meters.cpu_seconds()
        with meters.PeakMemory() as memory:
            seconds = meters.seconds(lambda: peer.restore(bound, path))
        figures |= {
            f"restore_{temperature}_seconds": seconds,
            f"restore_{temperature}_cpu_seconds": meters.cpu_seconds() - cpu,
            f"restore_{temperature}_peak_bytes": memory.peak,
        }
        _check(peer_name, state, expected)
    figures |= _restore_unverified(peer_name, peer, bound, state, path, expected, figures)
    figures |= _restore_new(peer_name, peer, path, expected)
    if peer.is_durable:  # last, so that everyone's durable save is the first
        files.fresh(path)
        figures["save_seconds"] = meters.seconds(lambda: peer.save_volatile(bound, path))
    return figures


def _restore_unverified(
    peer_name: str,
    peer: peers.Peer,
    bound: Any,
    state: State,
    path: str,
    expected: str,
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """The warm restore once more without verification; the same figure where there is none."""
    names = {
        f"restore_unverified{rest}": f"restore_warm{rest}" for rest in ("_seconds", "_cpu_seconds")
    }
    if not peer.is_verified:
        return {unverified: figures[warm] for unverified, warm in names.items()}
    _clear(state)
    files.fill_cache(path)
    cpu = meters.cpu_seconds()
    seconds = meters.seconds(lambda: peer.restore_unverified(bound, path))
    spent = meters.cpu_seconds() - cpu
    _check(peer_name, state, expected)
    return dict(zip(names, (seconds, spent), strict=True))


def _restore_new(peer_name: str, peer: peers.Peer, path: str, expected: str) -> dict[str, Any]:
    loaded: list[Mapping[str, torch.Tensor]] = []
    files.fill_cache(path)
    with meters.PeakMemory() as memory:
        seconds = meters.seconds(lambda: loaded.append(peer.restore_new(path)))
    _check(peer_name, loaded[0], expected)
    return {"restore_new_seconds": seconds, "restore_new_peak_bytes": memory.peak}


def measure_async(
    peer_name: str, workload: str, divisor: int, root: str, rounds: int = 1
) -> list[dict[str, Any]]:
    """Three saves in the background of a state that changes: blocked, durable, memory, disk.

    Each additional round is one more save, whose figures are those of another third save.
    """
    state = workloads.make(workload, divisor)
    size = sum(tensor.nbytes for tensor in state.values())
    peer = async_peers.ASYNC_PEERS[peer_name]()
    peer.start(state, os.path.join(root, "steps"))
    figures: dict[str, Any] = {"size_bytes": size}
    rest: list[dict[str, Any]] = []
    known: set[int] = set()
    num_saves = NUM_SAVES + rounds - 1
    first = expected = ""
    base = meters.PeakMemory()
    with base:
        for index in range(num_saves):
            expected = workloads.digest(state)
            first = first or expected
            cpu = meters.cpu_seconds()
            found = _save_once(peer, index, lambda: workloads.poke(state))
            if workload == "frozen":  # else nothing would be as the last step has it
                workloads.poke(state)
            number = min(index + 1, NUM_SAVES)
            named = {f"{name}_{number}_seconds": value for name, value in found.items()}
            named["cpu_seconds"] = meters.cpu_seconds() - cpu
            if index < NUM_SAVES:
                figures |= named
            else:
                rest.append(named)
            path = async_peers.step_path(peer.root, index)
            occupied = files.inodes(path)
            figures["disk_bytes"] = sum(occupied.values())
            figures["new_disk_bytes"] = sum(
                size for inode, size in occupied.items() if inode not in known
            )
            known = set(occupied)
            if index == 0:
                figures["peak_1_bytes"] = base.peak
            if index < num_saves - 1:
                figures["changed_bytes"] = workloads.change(workload, state)
    figures["peak_bytes"] = base.peak
    figures["growth_bytes"] = max(0, base.peak - figures["peak_1_bytes"])
    figures["num_files"] = len(list(files.walk_files(path)))
    _clear(state)
    peer.restore(num_saves - 1)
    _check(peer_name, state, expected)
    peer.close()
    # Rounds end with other bytes: the first save's are compared among systems.
    figures["digest"] = first
    return [figures, *rest]


def _save_once(
    peer: async_peers.AsyncPeer, step: int, disturb: Callable[[], object]
) -> dict[str, float]:
    """One save; right after its fence the state changes, which the step must not show."""
    path = async_peers.step_path(peer.root, step)
    figures: dict[str, float] = {}

    def until_durable() -> None:
        figures["blocked"] = meters.seconds(lambda: peer.save(step))
        figures["fence"] = meters.seconds(peer.fence)
        disturb()
        peer.wait()
        if not peer.is_durable:
            files.sync_tree(path)

    figures["durable"] = meters.seconds(until_durable)
    return figures


def _warm_up(peer: peers.Peer, path: str) -> None:
    """Imports and one-time setup are not compared."""
    small = {"w": torch.rand(1000)}
    bound = peer.bind(small)
    peer.save(bound, path)
    peer.restore(bound, path)
    peer.restore_new(path)
    files.fresh(path)


def _clear(state: State) -> None:
    for tensor in state.values():
        tensor.zero_()


def _check(peer_name: str, state: Mapping[str, torch.Tensor], expected: str) -> None:
    found = workloads.digest(state)
    if found != expected:
        raise UnequalWorkError(
            f"{peer_name} did not restore the bytes that were saved ({found}, not {expected})"
        )
