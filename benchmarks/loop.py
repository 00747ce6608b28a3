"""The cost of saving for a training loop that computes on one thread.

The loop runs a fixed number of steps: alone; while another process writes the same bytes, which is
the unavoidable cost of disk and kernel; and while it saves itself. Saves are far enough apart that
the previous one is durable by then. The modes take turns, a save each: a machine that is slower for
a minute is slower for all of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import async_peers, files, meters, peers, workloads

__all__ = ["NUM_SAVES", "measure", "steps_between"]

NUM_SAVES = 4
_STEP_SECONDS = 0.6
_MARGIN = 1.6
_SIDE = 1024


def steps_between(durable_seconds: float, step_seconds: float) -> int:
    """The number of steps between two saves: longer than the durable write, with a margin."""
    return max(3, math.ceil(_MARGIN * durable_seconds / step_seconds))


def measure(workload: str, divisor: int, root: str) -> dict[str, Any]:
    """Seconds of the same loop in every mode."""
    torch.set_num_threads(1)
    state = workloads.make(workload, divisor)
    size = sum(tensor.nbytes for tensor in state.values())
    module = peers.Holder(state)
    items, optimizer = async_peers.overlapped_items(module)
    step = _training_step(optimizer, _STEP_SECONDS / min(divisor, 4))
    step_seconds = min(meters.seconds(step) for _ in range(3))
    managers = _managers(os.path.join(root, "ours"))
    figures: dict[str, Any] = {"size_bytes": size, "step_seconds": step_seconds}
    other = _OtherWriter(size, root)

    def write_elsewhere() -> None:
        other.write()
        other.wait()

    writers: list[Callable[[int], object]] = [lambda save: write_elsewhere()]
    writers += [functools.partial(_save_and_wait, each, items) for each in managers.values()]
    for write in writers:  # the first allocates
        write(0)
    durable = max(meters.seconds(functools.partial(write, 1)) for write in writers)
    between = steps_between(durable, step_seconds)
    figures |= {"durable_seconds": durable, "steps_between_saves": between}
    modes: dict[str, Callable[[int], object]] = {
        "alone": lambda save: None,
        "other": lambda save: other.write(),
    }
    for name, manager in managers.items():
        modes[name] = lambda save, manager=manager: manager.save(100 + save, items)
    for save in range(NUM_SAVES):
        for name in [*modes][save % len(modes) :] + [*modes][: save % len(modes)]:
            os.sync()
            interval = functools.partial(_interval, step, modes[name], save, between)
            key = f"loop_{name}_seconds"
            figures[key] = figures.get(key, 0.0) + meters.seconds(interval)
            other.wait()
            for manager in managers.values():
                manager.wait_until_finished()
    other.close()
    for manager in managers.values():
        manager.close()
    return figures


def _save_and_wait(manager: Any, items: dict[str, Any], step: int) -> None:
    manager.save(step, items)
    manager.wait_until_finished()


def _interval(
    step: Callable[[], None], begin: Callable[[int], object], save: int, between: int
) -> None:
    begin(save)
    for _ in range(between):
        step()


def _training_step(optimizer: torch.optim.Optimizer, wanted_seconds: float) -> Callable[[], None]:
    """Forward and backward as a fixed number of products, then a step of a real optimizer."""
    parameters: list[torch.Tensor] = optimizer.param_groups[0]["params"]
    first, second = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)
    torch.mm(first, second)
    once = min(meters.seconds(lambda: torch.mm(first, second)) for _ in range(5))
    products = max(1, round(wanted_seconds / once))
    gradient = torch.rand_like(parameters[0])
    turn = [0]

    def step() -> None:
        for _ in range(products):
            torch.mm(first, second)
        # One tensor learns in each step: the update of all would be most of a step on a CPU.
        chosen = parameters[turn[0] % len(parameters)]
        turn[0] += 1
        chosen.grad = gradient
        optimizer.step()
        chosen.grad = None

    return step


def _managers(root: str) -> dict[str, Any]:
    """This library, with every staging option of this version."""
    import functional_ckpt as fc

    keep = fc.policies.LatestN(1)
    found = {"eager": fc.CheckpointManager(os.path.join(root, "eager"), keep_policy=keep)}
    with contextlib.suppress(async_peers.SkipMeasure):
        overlapped = async_peers.overlapped_option()
        found["overlapped"] = fc.CheckpointManager(
            os.path.join(root, "overlapped"), keep_policy=keep, **overlapped
        )
    return found


class _OtherWriter:
    """A process that writes and syncs as many bytes of its own memory on demand."""

    def __init__(self, size: int, root: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_write_when_told, args=(theirs, size, root), daemon=True
        )
        self._process.start()
        self._connection.recv()
        self._under_way = 0

    def write(self) -> None:
        """Starts a write."""
        self._connection.send("write")
        self._under_way += 1

    def wait(self) -> None:
        """Waits until all requested writes are durable."""
        for _ in range(self._under_way):
            self._connection.recv()
        self._under_way = 0

    def close(self) -> None:
        """Ends it."""
        self._connection.send("stop")
        self._process.join()


def _write_when_told(connection: Connection, size: int, root: str) -> None:
    data = os.urandom(2**20) * (size // 2**20)  # a plain write does not depend on the content
    path = files.fresh(os.path.join(root, "other"))
    os.makedirs(path)
    connection.send("ready")
    while connection.recv() == "write":
        with open(os.path.join(path, "data"), "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        files.sync_tree(path)
        connection.send("done")
