"""Declined saves of ranks that share a store."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from typing import Any

import torch.distributed as dist

_HOST = "127.0.0.1"
_NUM_STEPS = 1_000


def declined(num_ranks: int) -> dict[str, float]:
    """CPU seconds and store requests of 1,000 steps, for policies of the clock and of SIGTERM."""
    server = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(num_ranks) as pool:
        jobs = [(rank, num_ranks, server.port, folder) for rank in range(num_ranks)]
        found = pool.starmap(_run, jobs, chunksize=1)
    return {
        "1,000 declined saves, slowest rank": max(each["cpu"] for each in found),
        "the same, store requests of all ranks": sum(each["requests"] for each in found),
    }


def _run(rank: int, num_ranks: int, port: int, folder: str) -> dict[str, float]:
    import functional_ckpt as fc
    from functional_ckpt.distributed import torch_store

    store = dist.TCPStore(_HOST, port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    requests = 0
    start_call = torch_store._Calls.start

    def count(*args: Any) -> Any:
        nonlocal requests
        requests += 1
        return start_call(*args)

    torch_store._Calls.start = count
    policies = [fc.policies.every("90m"), fc.policies.Preemption()]
    with fc.CheckpointManager(folder, save_policy=policies) as manager:
        manager.should_save(0)  # the first round
        dist.barrier()
        requests, cpu = 0, time.process_time()
        for step in range(1, _NUM_STEPS + 1):
            if manager.save(step, {"x": 1}) is not None or manager.reached_preemption(step):
                raise RuntimeError("A save was accepted.")
        measured = {"cpu": time.process_time() - cpu, "requests": requests}
        dist.barrier()
    dist.destroy_process_group()
    return measured
