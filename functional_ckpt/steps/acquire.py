"""Who opens a directory together, and how such a job becomes its writer."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Coordinator, run_on_primary
from functional_ckpt.distributed.torch_store import default_coordinator
from functional_ckpt.steps.directory import Steps
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Lock

__all__ = ["coordinator_of", "acquire_writer_lock"]

_log = logging.getLogger("functional_ckpt")


def coordinator_of(coordinator: Coordinator | None, process_group: Any) -> Coordinator:
    """The coordinator that was given, or that of a process group; None for the default group."""
    if coordinator is None:
        return default_coordinator(process_group)
    if process_group is not None:
        raise errors.UsageError("Give process_group or coordinator, not both.")
    return coordinator


def acquire_writer_lock(steps: Steps, coordinator: Coordinator) -> Lock | None:
    """Makes the job the writer of the directory, and sure that all its ranks see the same one.

    Returns:
        The lock that the primary holds; None on the other ranks.

    Raises:
        LockedError: Another live writer holds the directory.
    """
    storage, hidden = steps.storage, steps.hidden
    mark = os.path.join(hidden, f"ranks.{uuid.uuid4().hex}.tmp")
    locks: list[Lock] = []

    def become_writer(_: Sequence[bytes]) -> bytes:
        locks.append(_lock_and_recover(steps))
        if coordinator.num_ranks > 1:
            storage.write(mark, b"")
        return os.path.basename(mark).encode()

    try:
        name = coordinator.gather_broadcast("opening the directory", b"", become_writer).decode()
        if coordinator.num_ranks > 1:
            look = functools.partial(
                commit.check_visible, storage, os.path.join(hidden, name), coordinator.rank
            )
            remove = functools.partial(storage.remove, mark)
            run_on_primary(coordinator, "seeing one directory", remove, prepare=look)
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    return locks[0] if locks else None


def _lock_and_recover(steps: Steps) -> Lock:
    """Takes the directory over: locks it, then removes what a dead writer left."""
    commit.makedirs_durable(steps.storage, steps.hidden)
    lock = steps.storage.lock(os.path.join(steps.hidden, "lock"))
    try:
        for line in commit.recover(steps.storage, steps.root, steps.hidden):
            _log.warning("%s: %s", steps.root, line)
    except BaseException:
        lock.release()
        raise
    return lock
