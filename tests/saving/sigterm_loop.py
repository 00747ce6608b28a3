"""A training loop that never looks for SIGTERM, and saves rarely."""

from __future__ import annotations

import hashlib
import time
from multiprocessing.connection import Connection

import torch

import functional_ckpt as fc

GRACE_SECONDS = 0.2


def items(step: int, size: int) -> dict[str, object]:
    return {"tree": {"w": torch.full((size,), float(step)), "n": step}}


def _call_c() -> None:
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 300_000)  # no handler of a signal runs within


def train(root: str, size: int, pipe: Connection) -> None:
    """Sends the time and each step, once `save` has returned."""
    torch.set_num_threads(1)
    policies = [7, fc.policies.Preemption(snapshot_every=1, grace_seconds=GRACE_SECONDS)]
    with fc.CheckpointManager(root, save_policy=policies) as manager:
        pipe.send((time.monotonic(), 0))
        _call_c()  # the warm-up
        for step in range(1, 10**6):
            manager.save(step, items(step, size))
            pipe.send((time.monotonic(), step))
            time.sleep(0.01)
            if step % 5 == 0:
                _call_c()
            if step % 4 == 0:  # an evaluation
                end = time.monotonic() + 0.5
                while time.monotonic() < end:
                    torch.ones(100, 100) @ torch.ones(100, 100)
