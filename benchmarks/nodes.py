"""The cost of saving every step into the memory of each node, with a copy on a partner.

    python -m benchmarks.nodes [--mebibytes M] [--steps N] [--pairs P]
        [--variants one both] [--own-core] [--dir DIRECTORY]

Two ranks are two nodes. All of their state changes in every step. A step is a fixed number of
products on one thread, about a second of CPU, and then both ranks meet. Blocks of steps with a save
after each, and without, take turns. The background work of a save falls into the next step: the
first step of a saving block follows a save, too, and the last save is not timed.

`both` has a training thread on each rank, `one` only on the first: on two cores, `both` leaves no
core for anything else.

With `--own-core` the system still gives other programs some 5 % of that core. A step alone pays for
all of it, and a step with a save, which waits in `save`, for less: the ratio may be up to
5 % too low.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import functional_ckpt as fc
from functional_ckpt.distributed.peer_link import receive_stream, send_stream
from functional_ckpt.distributed.torch_store import StoreCoordinator

_HOST = "127.0.0.1"
_NUM_LEAVES = 16
_SIDE = 1024
_STEP_SECONDS = 1.0
_VARIANTS = ["one", "both"]


class _Loop:
    """The training loop of one rank."""

    def __init__(self, state: dict[str, DTensor], *, has_own_core: bool) -> None:
        self._state = state
        self._has_own_core = has_own_core
        self._move({1})
        self._first = torch.rand(_SIDE, _SIDE, device="cpu")
        self._second = torch.rand(_SIDE, _SIDE, device="cpu")
        self._compute(5)
        start = time.thread_time()
        self._compute(10)
        self._num_products = round(10 * _STEP_SECONDS / (time.thread_time() - start))

    def _move(self, cores: set[int]) -> None:
        """Moves this thread, ahead of all other programs; threads that it starts come after."""
        if self._has_own_core:
            os.sched_setaffinity(0, cores)
            policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(1))

    def _compute(self, num_products: int) -> None:
        for _ in range(num_products):
            torch.mm(self._first, self._second)

    def step(self, *, computes: bool) -> float:
        """One step; returns the seconds of waiting for the other rank."""
        for value in self._state.values():
            value.to_local().add_(1.0)
        if computes:
            self._move({0})
            self._compute(self._num_products)
            self._move({1})
        start = time.perf_counter()
        dist.barrier()
        return time.perf_counter() - start


def _block(
    loop: _Loop, manager: fc.CheckpointManager | None, items: Any, steps: range, *, computes: bool
) -> dict[str, Any]:
    """Returns the seconds of each step, those blocked by `save`, and CPU seconds."""
    if manager is not None:
        manager.save(steps.start, items)
    dist.barrier()
    times = os.times()
    thread = time.thread_time()
    seconds: list[float] = []
    blocked: list[float] = []
    waited: list[float] = []
    for step in steps[1:]:
        start = time.perf_counter()
        waited.append(loop.step(computes=computes))
        before_save = time.perf_counter()
        if manager is not None:
            manager.save(step, items)
        seconds.append(time.perf_counter() - start)
        blocked.append(time.perf_counter() - before_save)
    thread = time.thread_time() - thread
    after = os.times()
    if manager is not None:
        manager.wait_until_finished()
    dist.barrier()
    return {
        "seconds": seconds,
        "blocked": blocked,
        "waited": waited,
        "cpu": after.user - times.user + after.system - times.system,
        "kernel": after.system - times.system,
        "training_cpu": thread,
    }


def _run(rank: int, port: int, folder: str, to: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    store = dist.TCPStore(_HOST, port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    node = "ab"[rank]
    mesh = init_device_mesh("cpu", (2,))
    rows = to.mebibytes * 2**20 // _NUM_LEAVES // 4096
    state = {
        f"w{n}": DTensor.from_local(torch.rand(rows, 1024, device="cpu"), mesh, [Shard(0)])
        for n in range(_NUM_LEAVES)
    }
    items = {"state": state}
    found: dict[str, Any] = {"limits": _limits(rank, to.mebibytes, folder)}
    loop = _Loop(state, has_own_core=to.own_core and rank == 0)
    step = 0
    with fc.CheckpointManager(
        Path(folder) / node, node_local=fc.NodeLocal(replicas=1, node=node), keep_policy=2
    ) as manager:
        manager.save(0, items)  # the first one allocates
        manager.wait_until_finished()
        for variant in to.variants:
            computes = variant == "both" or rank == 0
            for pair in range(to.pairs):
                order = (None, manager) if pair % 2 else (manager, None)
                for saving in order:
                    steps = range(step + 1, step + 2 + to.steps)
                    step = steps[-1]
                    block = _block(loop, saving, items, steps, computes=computes)
                    kind = "alone" if saving is None else "saving"
                    found.setdefault(f"{variant} {kind}", []).append(block)
        state_of_last = str(manager.metadata(manager.latest_step()).state)
    found["last"] = state_of_last
    dist.destroy_process_group()
    return found


def _cpu(action: Any) -> float:
    dist.barrier()
    start = time.process_time()
    action()
    return time.process_time() - start


def _limits(rank: int, mebibytes: int, folder: str) -> dict[str, float]:
    """Returns CPU seconds of each part of the work, for this rank's state."""
    source = np.ones(mebibytes * 2**20, np.uint8)
    target = np.empty_like(source)
    target.fill(0)
    path = Path(folder) / f"limit.{rank}"
    link = StoreCoordinator(dist.group.WORLD).link()

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for offset in range(0, len(source), 2**24):
                file.write(source[offset : offset + 2**24].data)

    def fill(piece: memoryview, offset: int) -> None:
        del piece, offset

    figures = {
        "copy": _cpu(lambda: np.copyto(target, source)),
        "hash": _cpu(lambda: xxhash.xxh3_64(source.data)),
        "write": _cpu(write),
    }
    for sender in (0, 1):
        if rank == sender:
            figures["send"] = _cpu(lambda: send_stream(link, 1 - rank, len(source), fill))
        else:
            figures["receive"] = _cpu(lambda: receive_stream(link, 1 - rank, len(source), fill))
    dist.barrier()
    link.close()
    path.unlink()
    return figures


def measure(to: argparse.Namespace) -> dict[str, Any]:
    """Returns the slowdown of the loop, and CPU seconds for each GiB."""
    server = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    before = time.process_time()
    with tempfile.TemporaryDirectory(dir=to.dir) as folder, context.Pool(2) as pool:
        found = pool.starmap(_run, [(rank, server.port, folder, to) for rank in range(2)], 1)
    figures: dict[str, Any] = {
        "the last step": found[0]["last"],
        "CPU s of the ranks' store": time.process_time() - before,
    }
    gib = 2 * to.mebibytes / 1024  # of both nodes
    for variant in to.variants:
        alone, saving = (found[0][f"{variant} {kind}"] for kind in ("alone", "saving"))
        medians = [
            statistics.median(s for b in blocks for s in b["seconds"]) for blocks in (alone, saving)
        ]
        sums = [[sum(b["seconds"]) for b in blocks] for blocks in (alone, saving)]
        ratios = sorted(with_saves / without for without, with_saves in zip(*sums, strict=True))
        cpu = {
            kind: [
                sum(b[part] for ranks in found for b in ranks[f"{variant} {kind}"])
                / (to.pairs * to.steps)
                for part in ("cpu", "kernel", "training_cpu")
            ]
            for kind in ("alone", "saving")
        }
        figures[variant] = {
            "step alone, s (median)": medians[0],
            "step with save, s (median)": medians[1],
            "ratio of medians": medians[1] / medians[0],
            "ratio of each pair of blocks": ratios,
            "blocked by save, s (median)": statistics.median(
                s for b in saving for s in b["blocked"]
            ),
            "waiting for the other rank, s (median)": statistics.median(
                s for b in saving for s in b["waited"]
            ),
            "CPU s for each GiB": (cpu["saving"][0] - cpu["alone"][0]) / gib,
            "of them in the kernel": (cpu["saving"][1] - cpu["alone"][1]) / gib,
            "of them in the training threads": (cpu["saving"][2] - cpu["alone"][2]) / gib,
        }
    figures["CPU s for each GiB, alone"] = {
        part: sum(ranks["limits"][part] for ranks in found) / gib for part in found[0]["limits"]
    }
    return figures


def main() -> None:
    """Measures and prints the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes")
    parser.add_argument("--mebibytes", type=int, default=100, help="the state of each rank")
    parser.add_argument("--steps", type=int, default=5, help="the steps of a block")
    parser.add_argument("--pairs", type=int, default=2, help="blocks with and without saves")
    text = (
        "core 0 computes for rank 0 alone, ahead of other programs (on a loaded machine; as root)"
    )
    parser.add_argument("--own-core", action="store_true", help=text)
    parser.add_argument("--variants", nargs="+", default=_VARIANTS, choices=_VARIANTS)
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    parser.add_argument("--dir", default=shm, help="where the nodes' directories are")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
