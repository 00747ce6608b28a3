"""Commits temporary directories as steps, and recovers after a crash.

A step becomes visible by one rename of a durable directory (`commit_rename`), or on object stores
by a marker that is written last (`commit_marker`).
"""

from __future__ import annotations

from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit_base import HIDDEN, CommitProtocol
from functional_ckpt.storage.commit_rename import RenameCommit
from functional_ckpt.storage.durable import check_visible, makedirs_durable, sync_tree
from functional_ckpt.storage.tmp_paths import TMP_SUFFIX, final_path, tmp_path

__all__ = [
    "HIDDEN",
    "TMP_SUFFIX",
    "CommitProtocol",
    "check_visible",
    "final_path",
    "makedirs_durable",
    "protocol",
    "sync_tree",
    "tmp_path",
]


def protocol(storage: Storage, root: str) -> CommitProtocol:
    """Returns the commit protocol of the store: renames, or markers on an object store."""
    if storage.objects is not None:
        from functional_ckpt.storage.commit_marker import MarkerCommit  # late: fckpt starts faster

        return MarkerCommit(storage, root, storage.objects)
    return RenameCommit(storage, root)
