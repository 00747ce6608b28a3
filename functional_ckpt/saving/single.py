"""Writes one checkpoint without a manager: under a claim on its path, and again after an outage."""

from __future__ import annotations

import contextlib
import functools
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
    commits = commit.protocol(storage, os.path.dirname(final))
    published: list[str] = []

    def attempt(cleanup: contextlib.ExitStack) -> None:
        create = functools.partial(cleanup.enter_context, commits.claimed(final))
        what, has_token = f"starting to save {final}", commits.repeats_names
        begun = write_lib.begin(group, what, items, commits.root, create, has_token=has_token)
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

    try:
        with contextlib.ExitStack() as cleanup:
            attempt(cleanup)
    except errors.StorageError as error:
        # A checkpoint whose publishing failed may be visible.
        if group.num_ranks > 1 or published or not retry.is_transient(error):
            raise
        _log.warning("writing %s again after: %s", final, error)
        with contextlib.ExitStack() as cleanup:
            attempt(cleanup)
