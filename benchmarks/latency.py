"""The manager's small costs: a save refused by policy, a tiny one until durable."""

from __future__ import annotations

import os
import statistics

import torch

from benchmarks import files, meters

__all__ = ["measure"]


def measure(root: str) -> dict[str, float]:
    """Seconds of one refused `save`, and of one tiny save and its commit, each a median."""
    import functional_ckpt as fc

    path = os.path.join(root, "latency")
    items = {"model": {"w": torch.rand(16)}}
    policies = [fc.policies.every("500ba"), fc.policies.Preemption()]
    with fc.CheckpointManager(path, save_policy=policies) as manager:
        refused = [
            meters.seconds(lambda step=step: manager.save(step, items)) for step in range(1, 400)
        ]
    files.fresh(path)
    with fc.CheckpointManager(path) as manager:

        def save_and_wait(step: int) -> None:
            commit = manager.save(step, items)
            if commit is not None:
                commit.result()

        tiny = [meters.seconds(lambda step=step: save_and_wait(step)) for step in range(60)]
    return {
        "refused_save_seconds": statistics.median(refused),
        "tiny_save_committed_seconds": statistics.median(tiny[10:]),
    }
