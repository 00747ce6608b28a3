"""One measurement in a process of its own; prints one line of JSON."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers, workloads

__all__ = ["main"]


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0]) * 1024


class _PeakMemory:
    """The largest anonymous memory above that at the start, looked at every two milliseconds."""

    def __enter__(self) -> _PeakMemory:
        self.start = _anonymous_bytes()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, _anonymous_bytes() - self.start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _drop_cache(path: str) -> None:
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        digest.update(state[name].numpy())
    return digest.hexdigest()


def _store_and_load(peer_name: str, workload: str, divisor: int, root: str) -> dict[str, Any]:
    peer = peers.PEERS[peer_name]()
    path = peers.fresh(os.path.join(root, peer_name.replace(".", "_")))
    warm = {"w": torch.rand(1000)}
    peer.save(
        warm, peers.fresh(path + ".warm")
    )  # imports and first-use costs are not what is compared
    peer.restore(warm, path + ".warm")
    peers.fresh(path + ".warm")
    state = workloads.make(workload, divisor)
    expected = _digest(state)
    size_bytes = sum(tensor.nbytes for tensor in state.values())

    def save() -> None:
        peer.save(state, path)
        if not peer.is_durable:
            peers.sync_tree(path)

    cpu = time.process_time()
    with _PeakMemory() as memory:
        durable = _seconds(save)
    cpu = time.process_time() - cpu
    files = [os.path.join(d, name) for d, _, names in os.walk(path) for name in names]
    figures: dict[str, Any] = {
        "size_bytes": size_bytes,
        "save_durable_seconds": durable,
        "save_cpu_seconds": cpu,
        "save_peak_bytes": memory.peak,
        "disk_bytes": sum(os.path.getsize(file) for file in files),
        "num_files": len(files),
    }
    for temperature in ("warm", "cold"):
        for tensor in state.values():
            tensor.zero_()
        if temperature == "cold":
            _drop_cache(path)
        with _PeakMemory() as memory:
            figures[f"restore_{temperature}_seconds"] = _seconds(lambda: peer.restore(state, path))
        figures[f"restore_{temperature}_peak_bytes"] = memory.peak
        if _digest(state) != expected:
            raise SystemExit(f"{peer_name} did not restore what it saved: the figures mean nothing")
    peers.fresh(path)
    return figures


def _limits(divisor: int, root: str) -> dict[str, Any]:
    """What the machine can do with the bytes of `big`: copies, writes and reads, no format."""
    import numpy as np

    from functional_ckpt.storage.staging import copy_in_threads

    count, size_bytes = workloads.WORKLOADS["big"]
    count = max(1, count // divisor)
    source = [np.random.default_rng(i).random(size_bytes // 8) for i in range(count)]
    target = [np.ones_like(array) for array in source]
    figures: dict[str, Any] = {"size_bytes": count * size_bytes}
    figures["memcpy_1_thread_seconds"] = _seconds(
        lambda: [np.copyto(a, b) for a, b in zip(target, source, strict=True)] and None
    )
    figures["memcpy_2_threads_seconds"] = _seconds(
        lambda: copy_in_threads(list(zip(target, source, strict=True)))
    )
    path = peers.fresh(os.path.join(root, "limits"))
    os.makedirs(path)

    def write() -> None:
        for index, array in enumerate(source):
            with open(os.path.join(path, str(index)), "wb") as file:
                file.write(memoryview(array).cast("B"))
        peers.sync_tree(path)

    def read() -> None:
        for index, array in enumerate(target):
            with open(os.path.join(path, str(index)), "rb") as file:
                file.readinto(memoryview(array).cast("B"))

    figures["write_synced_seconds"] = _seconds(write)
    figures["read_warm_seconds"] = _seconds(read)
    _drop_cache(path)
    figures["read_cold_seconds"] = _seconds(read)
    peers.fresh(path)
    return figures


def _latency(root: str) -> dict[str, Any]:
    """The manager's small costs: a save refused by policy, and a tiny one until durable."""
    import functional_ckpt as fc

    path = peers.fresh(os.path.join(root, "latency"))
    items = {"model": {"w": torch.rand(16)}}
    refused: list[float] = []
    policies = [fc.policies.every("500ba"), fc.policies.Preemption()]
    with fc.CheckpointManager(path, save_policy=policies) as manager:
        for step in range(1, 400):
            refused.append(_seconds(lambda step=step: manager.save(step, items) and None))
    tiny: list[float] = []
    with fc.CheckpointManager(peers.fresh(path), keep_policy=None) as manager:
        for step in range(60):

            def save_and_wait(step: int = step) -> None:
                commit = manager.save(step, items)
                if commit is not None:
                    commit.result()

            tiny.append(_seconds(save_and_wait))
    peers.fresh(path)
    return {
        "refused_save_seconds": sorted(refused)[len(refused) // 2],
        "tiny_save_committed_seconds": sorted(tiny[10:])[25],
    }


def _blocked(workload: str, divisor: int, root: str) -> dict[str, Any]:
    """How long an asynchronous save blocks, first and third, with one state's worth of buffers."""
    import functional_ckpt as fc

    path = peers.fresh(os.path.join(root, "blocked"))
    state = workloads.make(workload, divisor)
    figures: dict[str, Any] = {"size_bytes": sum(t.nbytes for t in state.values())}
    with fc.CheckpointManager(path, keep_policy=fc.policies.LatestN(1)) as manager:
        for step in range(4):
            start = time.perf_counter()
            commit = manager.save(step, {"state": state})
            figures[f"blocked_{step + 1}_seconds"] = time.perf_counter() - start
            if commit is not None:
                commit.result()
    figures["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peers.fresh(path)
    return figures


def main(arguments: list[str]) -> None:
    """Runs one measurement and prints it."""
    kind, root, divisor = arguments[0], arguments[1], int(arguments[2])
    if kind == "limits":
        figures = _limits(divisor, root)
    elif kind == "latency":
        figures = _latency(root)
    elif kind == "blocked":
        figures = _blocked(arguments[3], divisor, root)
    else:
        figures = _store_and_load(kind, arguments[3], divisor, root)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
