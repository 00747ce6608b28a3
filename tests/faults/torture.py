"""The items of the kill test, and the process that saves them until it is killed.

Run as a script it is the template: it imports everything once, forks a victim for each line it is
given, and says when the victim is dead. Nothing in it may use TensorStore before the fork.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch

import functional_ckpt as fc
from functional_ckpt.core.files import file_plan

KEEP = 3


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.norm = torch.nn.BatchNorm1d(32)
        self.last = torch.nn.Linear(32, 4, bias=False, dtype=torch.bfloat16)


def new_items() -> dict[str, Any]:
    """Live objects; `fill` gives them the state of a step."""
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tree = {"step": 0, "version": 0, "shadow": [torch.zeros(3, 5), torch.zeros(2000)], "note": ""}
    return {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "tree": tree,
        "config": fc.Json({"version": 0}),
    }


def fill(items: dict[str, Any], step: int, version: int) -> dict[str, Any]:
    """The same objects in the state that `version` of `step` has, every bit of it."""
    generator = torch.Generator().manual_seed(step * 1_000_003 + version)
    optimizer = optimizer_of(items)
    with torch.no_grad():
        for tensor in items["model"].state_dict().values():
            _randomize(tensor, generator)
        for state in optimizer.state.values():
            for tensor in state.values():
                _randomize(tensor, generator)
    optimizer.param_groups[0]["lr"] = 1.0 / (1 + version)
    tree = items["tree"]
    for tensor in tree["shadow"]:
        _randomize(tensor, generator)
    tree |= {"step": step, "version": version, "note": f"step {step}, version {version}"}
    items["config"] = fc.Json({"version": version})
    return items


def optimizer_of(items: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The live optimizer behind the item."""
    return items["optimizer"].value


def _randomize(tensor: torch.Tensor, generator: torch.Generator) -> None:
    if tensor.is_floating_point():
        tensor.normal_(generator=generator)
    else:
        tensor.random_(0, 1000, generator=generator)


def save_until_killed(items: dict[str, Any], root: str, seed: int, version: int) -> None:
    """Saves forever, new and existing steps; reports durable ones."""
    choose = random.Random(seed)
    # Both layouts: one database for each item, and several that are merged.
    file_plan.BYTES_PER_FILE = choose.choice((1000, 2**30))
    with fc.CheckpointManager(
        root, keep_policy=fc.policies.LatestN(KEEP), overwrite=True
    ) as manager:
        _say(f"opened {seed}")
        pending: tuple[fc.Commit, int] | None = None
        while True:
            version += 1
            steps = manager.all_steps()
            step = (manager.latest_step() or 0) + 1
            if steps and choose.random() < 0.4:
                step = choose.choice(steps)
            elif pending is not None:
                step = max(step, pending[0].step + 1)
            commit = manager.save(step, fill(items, step, version), metrics={"version": version})
            if pending is not None:
                _report(*pending)
            assert commit is not None
            pending = commit, version
            if choose.random() < 0.3:
                _report(*pending)
                pending = None


def _report(commit: fc.Commit, version: int) -> None:
    _say(f"saved {commit.result()} {version}")


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one short write to a pipe is atomic, and buffers nothing


def main() -> None:
    torch.set_num_threads(1)
    import functional_ckpt.manager  # noqa: F401 - the template pays for every import

    items = new_items()
    _say("ready")
    for line in sys.stdin:
        root, seed, version = line.rsplit(" ", 2)
        pid = os.fork()
        if pid == 0:
            faulthandler.dump_traceback_later(60, exit=True)  # it should be dead by then
            try:
                save_until_killed(items, root, int(seed), int(version))
            except BaseException:
                traceback.print_exc()
            os._exit(70)
        _say(f"pid {pid}")
        _, status = os.waitpid(pid, 0)
        _say(f"dead {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
