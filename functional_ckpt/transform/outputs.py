"""The path of a new checkpoint, and the progress of writing it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeAlias

from functional_ckpt import errors
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.saving.claim import check_free
from functional_ckpt.storage.base import Storage

Report: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that were read so far, and with those to be read."""


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


class Count:
    """Counts bytes on any thread."""

    def __init__(self, total: int, report: Report | None) -> None:
        self._done, self._total, self._report = 0, total, report
        self._mutex = threading.Lock()

    def start(self) -> None:
        """Counts from zero."""
        self._done = 0

    def add(self, num_bytes: int) -> None:
        """Adds bytes, and reports them."""
        with self._mutex:
            self._done += num_bytes
            if self._report is not None:
                self._report(self._done, self._total)
