"""Decides which failed writes are repeated.

A file is never synced again after its sync has failed: the kernel may have dropped its pages. The
complete checkpoint is written again, into a new directory.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO}
)


def is_full(error: BaseException) -> bool:
    """Returns whether a full disk caused an error."""
    return not _FULL.isdisjoint(_codes_of(error))


def is_transient(error: BaseException) -> bool:
    """Returns whether a second attempt may succeed."""
    return not _TRANSIENT.isdisjoint(_codes_of(error))


def _codes_of(error: BaseException | None) -> Iterator[int]:
    while error is not None:
        if (code := getattr(error, "errno", None)) is not None:
            yield code
        error = error.__cause__
