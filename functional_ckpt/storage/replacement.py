"""Replaces a single directory by two renames, if directories cannot be exchanged in one step.

    <final>                                  the old directory, then the new one
    <final>.orbax-checkpoint-tmp-replaced    the old directory, between the two renames

The name of the old directory serves as the journal. Only one process may do this at a time: within
`tmp_paths.serialized`, or under a lease.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit_base import CommitProtocol, rollback
from functional_ckpt.storage.queries import exists
from functional_ckpt.storage.tmp_paths import tmp_path

_ENDING = "-replaced"
_MAX_NAME_BYTES = 255


def replace(storage: Storage, tmp: str, final: str) -> str:
    """Renames `tmp` to `final`, durably; returns where the old directory is, which is `tmp`."""
    old = _replaced(final)
    storage.rename(final, old)
    with rollback(lambda: storage.rename(old, final)):
        storage.rename(tmp, final)
        with rollback(lambda: storage.rename(final, tmp)):
            storage.sync(os.path.dirname(final))
    storage.rename(old, tmp)
    return tmp


def is_replaced(path: str) -> bool:
    """Returns whether the path is that of an old directory."""
    return path.endswith(_ENDING)


def is_under_way(storage: Storage, final: str) -> bool:
    """Returns whether a replacement is between its two renames."""
    old = _replaced(final)
    # If the name is too long, the first rename was refused.
    return len(os.fsencode(os.path.basename(old))) <= _MAX_NAME_BYTES and exists(storage, old)


def finish(storage: Storage, final: str, is_there: Callable[[str], bool]) -> None:
    """Completes an interrupted replacement: removes the old directory, or restores it.

    `is_there` returns whether a directory exists, and is complete where renames copy.
    """
    if not is_under_way(storage, final):
        return
    old = _replaced(final)
    if is_there(final):
        storage.remove(old)
    elif is_there(old):
        if storage.objects is not None:
            storage.remove(final)  # an incomplete copy
        storage.rename(old, final)
        storage.sync(os.path.dirname(final))


def old_copy(commits: CommitProtocol, final: str) -> str | None:
    """Returns the old directory between the two renames of a replacement, for readers, or None.

    A manager's overwrite is in progress as long as its journal exists.
    """
    if commits.is_committed(final):
        return None
    if is_under_way(commits.storage, final) and commits.is_committed(_replaced(final)):
        return _replaced(final)
    old = commits.overwritten(final)
    return old if old is not None and commits.is_committed(old) else None


def _replaced(final: str) -> str:
    return tmp_path(final) + _ENDING
