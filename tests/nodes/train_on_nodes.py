"""A program for torchrun on several nodes, each with a directory of its own.

    torchrun --nnodes=2 ... train_on_nodes.py ROOT

The last rank is killed after step 3 of the first attempt. The first one notes for each attempt the
step that it resumed from, and whether the state was that of this step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import functional_ckpt as fc

NUM_STEPS, KILLED_AT = 6, 3


def main(root: Path) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    local = torch.full((3,), float(rank))
    state = {"w": DTensor.from_local(local, mesh, [Shard(0)])}
    directory = root / os.environ["FUNCTIONAL_CKPT_NODE"]
    with fc.CheckpointManager(
        directory, node_local=fc.NodeLocal(replicas=1), timeout_seconds=60
    ) as manager:
        latest = manager.latest_step()
        if latest is not None:
            state = manager.restore(latest, {"state": state})["state"]
        is_right = torch.equal(state["w"].to_local(), local.new_full((3,), rank + (latest or 0)))
        if rank == 0:
            with (root / "attempts.txt").open("a") as file:
                file.write(f"{latest} {is_right}\n")
        for step in range((latest or 0) + 1, NUM_STEPS + 1):
            state["w"].to_local().add_(1.0)
            manager.save(step, {"state": state})
            manager.wait_until_finished()
            is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if step == KILLED_AT and is_first and rank == count - 1:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
