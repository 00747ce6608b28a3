"""From a temporary directory to a committed step, and what to do with what a crash left.

    <root>/<step>.orbax-checkpoint-tmp-*/    a step being written; hidden from every reader
    <root>/<step>/                           a committed step
    <root>/.functional_ckpt/lock             the live writer's lock
    <root>/.functional_ckpt/trash/           steps on their way out
    <root>/.functional_ckpt/replacing.json   journal of an overwrite in two renames
    <root>/.functional_ckpt/removing.json    journal of removals that one rename cannot do
    <root>/.functional_ckpt/metrics/         metrics recorded after their step was committed

A step becomes visible by one rename of a directory whose every byte is durable, and only then
counts. Where there is no rename, it does by a marker: `commit_objects`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Collection, Iterable

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage import commit_marker, removal, replacement, tmp_paths
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import ObjectStorage
from functional_ckpt.storage.paths import check_arrays_path
from functional_ckpt.storage.replacement import rollback
from functional_ckpt.storage.tmp_paths import TMP_SUFFIX, final_path, tmp_path

__all__ = [
    "HIDDEN",
    "TMP_SUFFIX",
    "abandon",
    "check_visible",
    "claim_lock",
    "create_tmp",
    "discard",
    "final_path",
    "finish_overwrite",
    "makedirs_durable",
    "publish",
    "recover",
    "sync_tree",
    "tmp_path",
]

HIDDEN = ".functional_ckpt"
_JOURNAL = "replacing.json"
_REPLACED = ".replaced"
_SETTLE_SECONDS = 2.0
_STALE_SECONDS = 60.0
_log = logging.getLogger("functional_ckpt")


def makedirs_durable(storage: Storage, path: str) -> None:
    """Creates a directory that will hold durable things, and its parents, durably."""
    missing: list[str] = []
    above = path
    while not storage.exists(above):
        missing.append(above)
        parent = os.path.dirname(above)
        if parent in ("", above):  # the end of a relative path, or of a URI in another store
            raise errors.UsageError(
                f"{path}: not a path in {type(storage).__name__}; give an absolute path, or the "
                "storage that the URI is in.",
                path=path,
            )
        above = parent
    storage.make_directory(path)
    for each in reversed(missing):
        storage.sync_directory(os.path.dirname(each))


def create_tmp(storage: Storage, final: str) -> str:
    """Makes the empty place where a step is written before it is published as `final`.

    Its parent is there already, and is not made again if it was moved away.
    """
    if isinstance(storage, ObjectStorage):
        return commit_marker.begin(storage, tmp_path(final), final)
    check_arrays_path(final)
    tmp = tmp_paths.unique_tmp_path(final)
    storage.make_directory(tmp, parents=False)
    return tmp


def claim_lock(final: str) -> str:
    """Where the lease is of who writes a single checkpoint to an object store."""
    return f"{final}.functional_ckpt-lock"


def check_visible(storage: Storage, path: str, rank: int) -> None:
    """Raises `CoordinationError` where `rank` does not see what the primary has just made.

    Network file systems remember for a while what was not there; listing the parent
    makes them look.
    """
    parent, name = os.path.split(path)
    deadline = time.monotonic() + _SETTLE_SECONDS
    while name not in storage.list(parent) or not storage.exists(path):
        if time.monotonic() >= deadline:
            raise errors.CoordinationError(
                f"Rank {rank} cannot see {path}, created by rank 0. All ranks must use the same "
                "directory on a shared file system.",
                ranks=(rank,),
                path=path,
            )
        time.sleep(_SETTLE_SECONDS / 20)


def sync_tree(storage: Storage, directory: str, files: Iterable[str]) -> None:
    """Makes `files` (relative paths) and every directory from theirs up to `directory` durable.

    All are synced after all were written: the first sync takes the others' metadata along.
    """
    if isinstance(storage, ObjectStorage):
        return  # an object is durable once it is written
    files = tuple(files)
    for name in files:
        storage.sync(os.path.join(directory, name))
    for folder in _folders(files):
        storage.sync_directory(os.path.join(directory, folder) if folder else directory)


def _folders(files: Iterable[str]) -> list[str]:
    """Every directory above the files, deepest first; the top is the empty string."""
    found = {""}
    for name in files:
        while name := os.path.dirname(name):
            found.add(name)
    return sorted(found, key=lambda name: (not name, -name.count("/"), name))


def publish(
    storage: Storage,
    tmp: str,
    final: str,
    hidden: str | None = None,
    *,
    overwrite: bool = True,
) -> str | None:
    """Makes the complete, durable directory `tmp` visible as `final`; durable when it returns.

    Args:
        storage: The file system.
        tmp: A directory whose content is durable, from `create_tmp`.
        final: Its name from now on. When it exists it is exchanged, never absent for a moment where
            the system can exchange; else journalled.
        hidden: The root's hidden directory, for the journal and the trash.
        overwrite: Whether what is there may be replaced; it may have come since that was asked.

    Returns:
        Where the replaced directory is now, for the caller to remove; None when nothing was
        replaced.

    Raises:
        StepExistsError, StorageError: Nothing changed: `tmp` is still `tmp`, and what was `final`
            still is.
    """
    parent = os.path.dirname(final)
    if isinstance(storage, ObjectStorage):
        if tmp == final:
            commit_marker.publish(storage, tmp_path(final), final)
            return None
        commit_marker.write_marker(storage, tmp)
    if not storage.exists(final):
        storage.rename(tmp, final)
        with rollback(lambda: storage.rename(final, tmp)):
            storage.sync_directory(parent)
        return None
    if not overwrite:
        raise errors.StepExistsError(
            f"{final} was created by another process during this save.", path=final
        )
    if not storage.is_directory(final):
        raise errors.StorageError(
            f"Cannot write {final}: the path is a file, not a checkpoint. Move it away.",
            errno=errno.ENOTDIR,
            path=final,
        )
    if storage.swap(tmp, final):
        with rollback(lambda: storage.swap(tmp, final)):
            storage.sync_directory(parent)
        return tmp
    if hidden is None:
        return replacement.replace(storage, tmp, final)
    return _replace_in_two(storage, tmp, final, hidden)


def _replace_in_two(storage: Storage, tmp: str, final: str, hidden: str) -> str:
    """Overwrites by two renames; the journal lets the next writer finish what a crash cut."""
    parent = os.path.dirname(final)
    _make_trash(storage, hidden)
    old = _replaced(hidden, final)
    storage.remove(old)
    journal = os.path.join(hidden, _JOURNAL)
    record = {"tmp": os.path.basename(tmp), "final": os.path.basename(final)}
    storage.replace(journal, json.dumps(record).encode())
    storage.rename(final, old)
    with rollback(lambda: storage.rename(old, final)):
        storage.rename(tmp, final)
        with rollback(lambda: storage.rename(final, tmp)):
            storage.sync_directory(parent)
            storage.remove(journal)
            storage.sync_directory(hidden)
    return old


def _replaced(hidden: str, final: str) -> str:
    """Where a step is while it is being replaced by two renames."""
    return os.path.join(hidden, "trash", f"{os.path.basename(final)}{_REPLACED}")


def _make_trash(storage: Storage, hidden: str) -> str:
    trash = os.path.join(hidden, "trash")
    storage.make_directory(hidden, parents=False)
    storage.make_directory(trash, parents=False)
    return trash


def discard(storage: Storage, path: str, hidden: str) -> None:
    """Takes a directory out of sight at once, then removes it; a crash leaves only trash."""
    root, name = os.path.split(path)
    for error in removal.remove(storage, root, hidden, [name]).values():
        raise error


def recover(storage: Storage, root: str, hidden: str, *, but: Collection[str] = ()) -> list[str]:
    """Finishes or removes what a dead writer left; only the holder of the lock may call it.

    Args:
        storage: The file system.
        root: The directory of the steps.
        hidden: Its hidden directory.
        but: Names of steps whose unfinished state is to stay.

    Returns:
        What was done, one line each, for the log.
    """
    done = finish_overwrite(storage, root, hidden)
    for name in storage.list(root):
        if TMP_SUFFIX in name and not name.startswith(".") and final_path(name) not in but:
            path = os.path.join(root, name)
            if _is_mid_swap(storage, hidden, final_path(path)):
                continue  # it or the copy that it was to replace is all that is left of a step
            if _remove_unfinished(storage, path, hidden):
                done.append(f"removed unfinished {name}")
    done += removal.finish(storage, root, hidden)
    trash = os.path.join(hidden, "trash")
    for name in storage.list(trash):
        final = os.path.join(root, name.removesuffix(_REPLACED))
        if name.endswith(_REPLACED) and _is_mid_swap(storage, hidden, final):
            done.append(
                f"kept {os.path.join(trash, name)}, a step that is not in the directory, and no "
                f"journal says why: move it to {final}, or remove it"
            )
        else:
            storage.remove(os.path.join(trash, name))
    for name in storage.list(hidden):
        if name.endswith(".tmp"):
            storage.remove(os.path.join(hidden, name))
    metrics = os.path.join(hidden, "metrics")
    for name in storage.list(metrics):
        path = os.path.join(metrics, name)
        # An evaluator beside this writer may be about to rename a fresh one.
        if name.endswith(".tmp") and storage.age_seconds(path) > _STALE_SECONDS:
            storage.remove(path)
    return done


def _remove_unfinished(storage: Storage, path: str, hidden: str) -> bool:
    """Removes what a writer left at a temporary name; False where that writer may be alive.

    The holder of the lock knows that no manager is. Others have no part in the lock.
    """
    final = final_path(path)
    if isinstance(storage, ObjectStorage):
        if storage.exists(claim_lock(final)):
            return False
        commit_marker.clean_up(storage, tmp_path(final), final)
        return True
    if isinstance(storage, LocalStorage) and replacement.is_replaced(path):
        try:
            with tmp_paths.serialized(os.path.dirname(path), wait_seconds=0.0):
                replacement.finish(storage, final)
        except errors.LockedError:
            return False
        return True
    if isinstance(storage, LocalStorage) and tmp_paths.is_claim(path):
        return tmp_paths.remove_if_dead(storage, path)
    # Out of sight first: were its writer alive all the same, it would publish all of it or nothing.
    if storage.exists(hidden):
        target = os.path.join(hidden, f"{os.path.basename(path)}.tmp")
        storage.remove(target)
        storage.rename(path, target)
        path = target
    storage.remove(path)
    return True


def finish_overwrite(storage: Storage, root: str, hidden: str) -> list[str]:
    """Ends an overwrite in two renames that was cut; to be called before anything new is written.

    The two steps are both whole between the renames, and only there is the old one in the trash and
    out of sight. In any other state the journal is of an overwrite that was over, or taken back.

    Returns:
        What was done, one line each, for the log.
    """
    journal = os.path.join(hidden, _JOURNAL)
    if not storage.exists(journal):
        return []
    try:
        record = plain_json.parse(storage.read(journal))
        tmp, final = str(record["tmp"]), str(record["final"])
    except (ValueError, KeyError, TypeError) as error:
        raise errors.CorruptCheckpointError(
            f"{journal}: unreadable journal of an interrupted overwrite ({error}). Look at the "
            "directory and remove the file.",
            path=journal,
        ) from error
    for name in (tmp, final):
        if "/" in name or name in ("", ".", ".."):
            raise errors.CorruptCheckpointError(
                f"{journal}: {name!r} is not a name inside the directory.", path=journal
            )
    done: list[str] = []
    source, target = os.path.join(root, tmp), os.path.join(root, final)
    if _is_mid_swap(storage, hidden, target):
        if isinstance(storage, ObjectStorage):
            storage.remove(target)  # a copy that was cut
            source = source if storage.is_committed(source) else _replaced(hidden, target)
        storage.rename(source if storage.exists(source) else _replaced(hidden, target), target)
        storage.sync_directory(root)
        done.append(f"finished the replacement of {final}")
    storage.remove(journal)
    return done


def _is_mid_swap(storage: Storage, hidden: str, final: str) -> bool:
    """Whether a step is out of sight, between the two renames of its overwrite."""
    is_there = storage.is_committed if isinstance(storage, ObjectStorage) else storage.exists
    return is_there(_replaced(hidden, final)) and not is_there(final)


def abandon(storage: Storage, tmp: str) -> bool:
    """Removes what a failed save wrote; False where it is still there, for a later attempt."""
    path = final_path(tmp)
    if _is_mid_swap(storage, os.path.join(os.path.dirname(path), HIDDEN), path):
        _log.warning(
            "Leaving %s in place: the next save will complete the interrupted overwrite", tmp
        )
        return False
    if isinstance(storage, ObjectStorage):
        commit_marker.abandon(storage, tmp_path(path), path)
        return True
    try:
        storage.remove(tmp)
    except errors.StorageError as error:
        _log.warning("Could not remove %s, the next writer will: %s", tmp, error)
        return False
    return True
