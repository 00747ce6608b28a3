"""Run under torchrun by two processes; in the first attempt one dies before it makes its manager.

torchrun --standalone --nproc-per-node=2 --max-restarts=8 restarted.py ROOT
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import functional_ckpt as fc

NUM_STEPS = 3


def main(root: str) -> None:
    # In the store of all attempts, gloo finds addresses of the attempt before, and may wait there.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
    if dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(2.0)  # the other one has come to its manager
        os.kill(os.getpid(), signal.SIGKILL)
    with fc.CheckpointManager(root, timeout_seconds=20) as manager:
        for step in range(NUM_STEPS):
            manager.save(step, {"tree": {"w": torch.full((4,), float(step))}})


if __name__ == "__main__":
    main(sys.argv[1])
