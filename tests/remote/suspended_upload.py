"""A writer that suspends itself within an upload: `suspended_upload.py NAMES WHERE RUN NEAR`."""

from __future__ import annotations

import os
import sys
from typing import Any

import suspend_itself

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.buckets.base import CheckedFile
from functional_ckpt.storage.buckets.gcs import GcsBucket
from functional_ckpt.storage.buckets.s3 import ObstoreBucket

SIZE = 6_000_000  # elements: two parts on GCS, three on S3


def saved(near: str, run: str, names: str, value: float) -> fc.CheckpointManager:
    """Saves step 3 and starts its upload: `plain` names are those of a step without tiers."""
    items = suspend_itself.items(value, SIZE)
    tiers = [fc.Tier(path=run)]
    if names == "plain":
        with fc.CheckpointManager(near) as manager:
            manager.save(3, items)
        return fc.CheckpointManager(near, tiers=tiers)
    manager = fc.CheckpointManager(near, tiers=tiers)
    if (handle := manager.save(3, items)) is not None:
        handle.result()
    return manager


def main(names: str, where: str, run: str, near: str) -> None:
    """Suspends itself before a file is sent, or before its second part."""
    suspend_itself.shorten_leases(setattr, "A")
    num_reads = 0

    def is_second(_: Any, size: int | None = -1) -> bool:
        nonlocal num_reads
        num_reads += 1
        return num_reads == 2

    if where == "part":
        suspend_itself.stop_before(CheckedFile, "read", is_second)
    else:
        for owner in (ObstoreBucket, GcsBucket):
            suspend_itself.stop_before(owner, "upload", lambda *_: True)
    try:
        saved(near, run, names, 1.0).wait_until_finished()
        print("saved", flush=True)
    except errors.CheckpointError as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
