"""Single checkpoints and files, written by processes that hold no lock of a directory of steps.

Any number may write one path at once. Each writes into a temporary directory of its own, and one
rename makes it visible: the last one wins, or where nothing may be overwritten, the first.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator

from functional_ckpt import errors
from functional_ckpt.storage import commit, replacement, tmp_paths
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import ObjectStorage

__all__ = ["claimed", "publish", "recover"]

_log = logging.getLogger("functional_ckpt")


@contextlib.contextmanager
def claimed(storage: Storage, final: str) -> Generator[str]:
    """Gives a temporary directory in which to write `final`, and removes it in the end.

    The directory of `final` is created if need be.

    Raises:
        LockedError: On an object store, where there is no rename, another process writes `final`.
    """
    if not isinstance(storage, LocalStorage):
        with _leased(storage, final) as tmp:
            yield tmp
        return
    commit.makedirs_durable(storage, os.path.dirname(final))
    claim = tmp_paths.claim(storage, final)
    try:
        yield claim.path
    finally:
        try:
            storage.remove(claim.path)  # nothing where it was published
        except errors.StorageError as error:
            _log.warning("%s stays until %s is next written: %s", claim.path, final, error)
        finally:
            claim.release()


@contextlib.contextmanager
def _leased(storage: Storage, final: str) -> Generator[str]:
    lock = storage.lock(commit.claim_lock(final)) if isinstance(storage, ObjectStorage) else None
    tmp = commit.tmp_path(final)
    try:
        tmp = commit.create_tmp(storage, final)
        yield tmp
    except BaseException:
        commit.abandon(storage, tmp)
        raise
    finally:
        if lock is not None:
            lock.release()


def publish(storage: Storage, tmp: str, final: str, *, overwrite: bool) -> None:
    """Makes what was written in a claim visible as `final`; durable when it returns.

    Args:
        storage: The file system.
        tmp: From `claimed`, or a path in it; its content is durable.
        final: Its name from now on.
        overwrite: Whether what is there may be replaced.

    Raises:
        StepExistsError: Something is there, and must not be replaced.
    """
    if not isinstance(storage, LocalStorage):
        replaced = commit.publish(storage, tmp, final, overwrite=overwrite)
        if replaced is not None:
            storage.remove(replaced)
        return
    with tmp_paths.serialized(os.path.dirname(final)):
        replacement.finish(storage, final)
        replaced = commit.publish(storage, tmp, final, overwrite=overwrite)
    if replaced is not None:
        storage.remove(replaced)


def recover(storage: Storage, final: str) -> None:
    """Ends a replacement of `final` that a crash cut between its two renames."""
    if isinstance(storage, LocalStorage) and replacement.is_under_way(storage, final):
        with tmp_paths.serialized(os.path.dirname(final)):
            replacement.finish(storage, final)
