"""Opens a directory on all ranks of a job, and makes the job its writer."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.distributed import same_options
from functional_ckpt.distributed.collective import fails_on_all
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.distributed.torch_store import default_coordinator
from functional_ckpt.steps.first_tier import OPENING
from functional_ckpt.steps.node_local import NodeLocal
from functional_ckpt.steps.node_tier import NodeTier
from functional_ckpt.steps.run_steps import Steps


def coordinator_of(
    coordinator: Coordinator | None, process_group: Any, timeout_seconds: float | None = None
) -> Coordinator:
    """Returns the given coordinator, or that of a process group (None: the default one)."""
    if coordinator is None:
        seconds = timeout_seconds
        if seconds is not None and (type(seconds) not in (int, float) or not seconds > 0):
            raise errors.UsageError(
                f"timeout_seconds must be a number of seconds > 0; got {timeout_seconds!r}."
            )
        return default_coordinator(process_group, seconds)
    if process_group is not None or timeout_seconds is not None:
        raise errors.UsageError(
            "Pass a coordinator, or process_group and timeout_seconds; not both."
        )
    if not isinstance(coordinator, Coordinator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(f"coordinator must be a Coordinator; got {coordinator!r:.80}.")
    return coordinator


@contextlib.contextmanager
def checking_arguments(coordinator: Coordinator) -> Generator[None]:
    """Raises an error inside the block on every rank that opens the directory."""
    try:
        with fails_on_all(coordinator, OPENING):
            yield
    except Exception:
        coordinator.close()
        raise


def open_directory(
    steps: Steps, coordinator: Coordinator, options: Mapping[str, Any], *, owner: object
) -> None:
    """Makes the job the writer of the directory, unless `steps` is read-only.

    The heads of the first tier hold locks, as `steps.lock`. They are released once `owner`, the
    manager, is dropped and no commit needs them. All ranks of a writer must have equal options.

    Raises:
        LockedError: Another live writer holds the directory.
        CoordinationError: The ranks have different options, or see different directories.
    """
    try:
        steps.first.open(steps, same_options.to_bytes(options))
    except BaseException:
        steps.unlock()
        raise
    if steps.lock is not None:
        # Of the lock alone: whatever leads back to the manager would keep it alive.
        weakref.finalize(owner, steps.lock.abandon).atexit = False


def node_tier(node_local: NodeLocal | None, coordinator: Coordinator) -> NodeTier | None:
    """Returns the first tier on each node, still to be opened; None for a shared one."""
    if node_local is None:
        return None
    if not isinstance(node_local, NodeLocal):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(f"node_local must be fc.NodeLocal() or None; got {node_local!r}.")
    return NodeTier(coordinator, node_local)
