"""A writer that suspends itself once: `suspend_itself.py WHERE RUN [NEAR]`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.object_store import MARKER, ObjectStorage

LEASE_SECONDS = 3.0


def shorten_leases(patch: Callable[[Any, str, object], None], machine: str) -> None:
    """Leases of seconds, of a machine of its own."""
    patch(lease, "LEASE_SECONDS", LEASE_SECONDS)
    patch(lease, "_RENEW_SECONDS", LEASE_SECONDS / 4)
    patch(lease, "_LOOK_SECONDS", 0.2)
    patch(lease, "_machine", lambda: machine)


def items(value: float, size: int = 5000) -> dict[str, Any]:
    """The items."""
    return {"t": {"w": torch.full((size,), value)}}


def stop_before(owner: Any, name: str, is_place: Callable[..., bool]) -> None:
    original, is_armed = getattr(owner, name), [True]

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if is_armed[0] and is_place(*arguments):
            is_armed[0] = False
            print("suspended", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # another thread may take the signal: this one must not run ahead of it
        return original(*arguments, **options)

    setattr(owner, name, wrapper)


def main(where: str, run: str, near: str | None = None) -> None:
    """Saves steps 1 and 2, then 3, which is where it stops."""
    shorten_leases(setattr, "A")
    if near is None:
        manager = fc.CheckpointManager(run, keep_policy=fc.policies.LatestN(2))
    else:
        manager = fc.CheckpointManager(near, tiers=[fc.Tier(path=run)])
    for step in (1, 2):
        manager.save(step, items(100.0 + step)).result()
        manager.wait_until_finished()
    storage = manager._steps.storage if near is None else manager._steps.remote[0].storage
    if where == "marker":
        stop_before(ObjectStorage, "create", lambda _, path, data: path.endswith(MARKER))
    elif where == "late marker":
        stop_before(type(storage._bucket), "write", lambda _, key, data: key.endswith(MARKER))
    elif where == "prune":
        stop_before(ObjectStorage, "_delete", lambda _, path, entries: path.endswith("/1"))
    elif where == "late prune":
        stop_before(
            type(storage._bucket), "delete", lambda _, keys: any("run/1/" in key for key in keys)
        )
    else:
        stop_before(ObjectStorage, "put_file", lambda *_: True)
    try:
        manager.save(3, items(103.0)).result()
        manager.wait_until_finished()
        print("saved", flush=True)
    except errors.CheckpointError as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
