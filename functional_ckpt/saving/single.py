"""Writes one checkpoint without a manager: under a claim on its path, and again after an outage."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.saving import finalize, retry
from functional_ckpt.saving import write as write_lib
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.parts import StagedItem
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage

_log = logging.getLogger("functional_ckpt")


def write(
    storage: Storage,
    final: str,
    items: Sequence[LoweredItem],
    staged: Callable[[], Sequence[StagedItem]],
    info: finalize.CheckpointInfo,
    group: Coordinator,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint: complete and durable when it returns, absent when it raises.

    Args:
        storage: The store.
        final: The checkpoint's path, which was checked.
        items: The items.
        staged: Returns this rank's part of them.
        info: The checkpoint's metadata.
        group: The ranks, all of which call.
        overwrite: Whether to replace an existing checkpoint.
    """
    published: list[str] = []
    attempt = (storage, final, items, staged, info, group, published)
    try:
        _write(*attempt, overwrite=overwrite)
    except errors.StorageError as error:
        # A checkpoint whose publishing failed may be visible.
        if group.num_ranks > 1 or published or not retry.is_transient(error):
            raise
        _log.warning("writing %s again after: %s", final, error)
        _write(*attempt, overwrite=overwrite)


def _write(
    storage: Storage,
    final: str,
    items: Sequence[LoweredItem],
    staged: Callable[[], Sequence[StagedItem]],
    info: finalize.CheckpointInfo,
    group: Coordinator,
    published: list[str],
    *,
    overwrite: bool,
) -> None:
    """Writes every rank's part into a temporary directory, which the primary publishes.

    `published` gets the directory before it is published.
    """
    commits = commit.protocol(storage, os.path.dirname(final))
    with contextlib.ExitStack() as cleanup:
        begun = write_lib.begin(
            group,
            f"starting to save {final}",
            items,
            os.path.dirname(final),
            lambda: cleanup.enter_context(commits.claimed(final)),
            has_token=storage.objects is not None,
        )
        tmp = begun.tmp
        reports: dict[int, write_lib.RankReport] = {}

        def finish(_: Sequence[bytes]) -> bytes:
            every = write_lib.every_report(storage, begun, reports[0], group.num_ranks)
            finalize.finalize(storage, tmp, items, every, info, time.time_ns(), begun.token)
            published.append(tmp)
            commits.publish_claim(tmp, final, overwrite=overwrite)
            return b""

        with collective(group, f"saving {final}", finish):
            own = write_lib.write_part(storage, begun, staged(), group)
            if group.rank:
                write_lib.write_report(storage, begun, group.rank, own)
            reports[group.rank] = own
