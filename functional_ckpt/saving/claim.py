"""Whether a checkpoint without a manager may be written to a path."""

from __future__ import annotations

import os
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage

_MAX_SHOWN = 10


def check_free(storage: Storage, final: str, *, overwrite: bool) -> None:
    """Raises unless a checkpoint may be written to a path."""
    commits = commit.protocol(storage, os.path.dirname(final))
    commits.recover_claim(final)
    if queries.exists(storage, final):
        if not overwrite:
            raise errors.StepExistsError(
                f"{final} exists; pass overwrite=True to replace it, or choose another path.",
                path=final,
            )
        if not queries.is_directory(storage, final):
            raise errors.UsageError(f"{final} is a file, not a checkpoint.", path=final)
        if commits.is_committed(final) and (names := storage.list(final)):
            _check_replaceable(final, names)


def _check_replaceable(final: str, names: Sequence[str]) -> None:
    """Raises unless the directory is a checkpoint, since all of it would be removed."""
    if set(names).isdisjoint(checkpoint_dir.RECORD_FILES):
        shown = ", ".join(sorted(names)[:_MAX_SHOWN])
        raise errors.UsageError(
            f"{final} is a directory without a record of a checkpoint (it holds {shown}): "
            "overwrite=True replaces checkpoints only. Choose another path, or move it away.",
            path=final,
        )
