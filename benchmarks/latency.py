"""The manager's small costs: a save refused by policy, a tiny one until durable, a slow tier."""

from __future__ import annotations

import inspect
import os
import statistics
from typing import Any

import torch

from benchmarks import files, meters
from benchmarks.async_peers import SkipMeasure

__all__ = ["measure", "measure_tier"]


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


def measure_tier(root: str) -> dict[str, Any]:
    """Seconds blocked while a second, remote tier is slow: it must not be noticed."""
    import functional_ckpt as fc

    del root
    if not {"remote", "tiers"} & set(inspect.signature(fc.CheckpointManager).parameters):
        raise SkipMeasure("this version has no remote tier")
    raise SkipMeasure("the throttled tier is not measured yet")
