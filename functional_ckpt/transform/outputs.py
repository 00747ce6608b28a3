"""The path of a new checkpoint."""

from __future__ import annotations

import os

from functional_ckpt import errors
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.saving.claim import check_free
from functional_ckpt.storage.base import Storage


def check_new(storage: Storage, final: str) -> None:
    """Raises unless nothing is at the path of a new checkpoint."""
    try:
        check_free(storage, final, overwrite=False)
    except errors.StepExistsError as error:
        raise errors.StepExistsError(
            f"{final} exists and is never overwritten. Choose another path, or remove it.",
            path=final,
        ) from error
    if checkpoint_dir.has_record(storage, os.path.dirname(final)):
        raise errors.UsageError(
            f"{os.path.dirname(final)} is a checkpoint, which holds no other one. Choose another "
            "path.",
            path=final,
        )
