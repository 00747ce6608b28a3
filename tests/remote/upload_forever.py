"""Saves steps and uploads them, until it is killed: `upload_forever.py NEAR FAR`."""

from __future__ import annotations

import sys

import torch

import functional_ckpt as fc


def main(near: str, far: str) -> None:
    """Says which steps were reported, one a line."""
    manager = fc.CheckpointManager(
        near, keep_policy=[fc.policies.LatestN(2)], tiers=[fc.Tier(path=far)]
    )
    latest = manager.latest_step()
    first = 0 if latest is None else latest + 1
    print("open", flush=True)
    for step in range(first, first + 1000):
        state = {"w": torch.full((300_000,), float(step)), "b": torch.full((10,), float(step))}
        manager.save(step, {"state": state}).result()
        print(step, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
