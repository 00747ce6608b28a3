"""Opens a directory on all ranks of a job, and makes the job its writer."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import uuid
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.distributed import same_options
from functional_ckpt.distributed.collective import fails_on_all, run_on_primary
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.distributed.torch_store import default_coordinator, num_unjoined
from functional_ckpt.steps import writer_lock
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.storage import commit

_log = logging.getLogger("functional_ckpt")

_OPENING = "opening the directory"


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
        with fails_on_all(coordinator, _OPENING):
            yield
    except Exception:
        coordinator.close()
        raise


def open_directory(
    steps: Steps, coordinator: Coordinator, options: Mapping[str, Any], *, owner: object
) -> None:
    """Makes the job the writer of the directory, unless `steps` is read-only.

    The primary holds the lock, as `steps.lock`. It is released once `owner`, the manager, is
    dropped and no commit needs it. All ranks of a writer must see the same directory and have equal
    options.

    Raises:
        LockedError: Another live writer holds the directory.
        CoordinationError: The ranks have different options, or see different directories.
    """
    storage, hidden = steps.storage, steps.hidden
    mark = os.path.join(hidden, f"ranks.{uuid.uuid4().hex}.tmp")

    def become_writer(values: Sequence[bytes]) -> bytes:
        same_options.check(values)
        _lock_and_recover(steps, coordinator)
        if coordinator.num_ranks > 1:
            storage.write(mark, b"")
        return os.path.basename(mark).encode()

    given = same_options.to_bytes(options)
    if steps.read_only:
        coordinator.gather_broadcast(_OPENING, given, same_options.check)
        return
    try:
        name = coordinator.gather_broadcast(_OPENING, given, become_writer).decode()
        if coordinator.num_ranks > 1:
            look = functools.partial(
                commit.check_visible, storage, os.path.join(hidden, name), coordinator.rank
            )
            remove = functools.partial(storage.remove, mark)
            run_on_primary(
                coordinator, "checking that all ranks share one directory", remove, prepare=look
            )
    except BaseException:
        steps.unlock()
        raise
    if steps.lock is not None:
        # Of the lock alone: whatever leads back to the manager would keep it alive.
        weakref.finalize(owner, steps.lock.abandon).atexit = False


def _lock_and_recover(steps: Steps, coordinator: Coordinator) -> None:
    """Takes over the directory: locks it, then removes a dead writer's leftovers."""
    commit.makedirs_durable(steps.storage, steps.hidden)
    is_alone = coordinator.num_ranks == 1 and num_unjoined() > 1
    try:
        steps.lock = writer_lock.take(steps.storage, os.path.join(steps.hidden, "lock"))
    except errors.LockedError as error:
        if is_alone:
            raise errors.LockedError(f"{error.message} {_NOT_JOINED}", path=error.path) from None
        raise
    if is_alone:
        _log.warning("%s: %s", steps.root, _NOT_JOINED)
    for line in steps.commits.recover():
        _log.warning("%s: %s", steps.root, line)


_NOT_JOINED = (
    "WORLD_SIZE is set and greater than 1, but torch.distributed is not initialized, so each "
    "process opens the directory alone: call torch.distributed.init_process_group before making "
    "the CheckpointManager."
)
