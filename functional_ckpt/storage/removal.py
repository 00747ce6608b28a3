"""Steps on their way out of a directory: out of sight first, then removed.

    <root>/.functional_ckpt/trash/          where they are renamed to
    <root>/.functional_ckpt/removing.json   a journal: steps that are there and do not count

Where a directory can be renamed, one rename takes it out of sight. The journal is for what one
rename cannot do: several steps at once, and a directory that the file system refuses to move
(EXDEV, in the lower layer of an overlay). It names directories and the digests of their records,
so that it says nothing of a step that is written later under the same name. Readers pass over what
it names; the next writer finishes the removal.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage import commit_marker
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.object_store import ObjectStorage

__all__ = ["finish", "hidden_names", "hide", "remove", "unhide"]

_JOURNAL = "removing.json"


def remove(
    storage: Storage, root: str, hidden: str, names: Sequence[str]
) -> dict[str, errors.CheckpointError]:
    """Removes directories, in this order: each out of sight at once, then from disk.

    Returns:
        Name -> why it could not be removed; the others are gone.
    """
    failures: dict[str, errors.CheckpointError] = {}
    if isinstance(storage, ObjectStorage):
        for name in names:
            path = os.path.join(root, name)
            with _noting(failures, name):
                commit_marker.discard(storage, path + orbax.TMP_SUFFIX, path)
        return failures
    trash = os.path.join(hidden, "trash")
    moved: list[tuple[str, str]] = []
    for name in names:
        with _noting(failures, name):
            storage.make_directory(trash)
            # An old copy, of an overwrite that was cut, would else look like all that is left.
            storage.remove(os.path.join(trash, f"{name}.replaced"))
            target = os.path.join(trash, f"{name}.{uuid.uuid4().hex[:8]}")
            if _move(storage, root, hidden, name, target):
                moved.append((name, target))
    if moved:
        # Else a power cut could bring the name back, and less than the whole step with it.
        try:
            storage.sync_directory(root)
        except errors.CheckpointError as error:  # the next writer empties the trash
            return failures | {name: error for name, _ in moved}
    for name, target in moved:
        with _noting(failures, name):
            storage.remove(target)
    return failures


def _move(storage: Storage, root: str, hidden: str, name: str, target: str) -> bool:
    """Renames a directory into the trash; where that cannot be done, removes it where it is."""
    path = os.path.join(root, name)
    try:
        storage.rename(path, target)
    except errors.StorageError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return True
    hide(storage, root, hidden, [name])
    storage.remove(path)
    storage.sync_directory(root)
    unhide(storage, hidden, [name])
    return False


@contextlib.contextmanager
def _noting(failures: dict[str, errors.CheckpointError], name: str) -> Generator[None]:
    try:
        yield
    except errors.CheckpointError as error:
        failures[name] = error


# ------------------------------------------------------------------------------------ the journal


def hide(storage: Storage, root: str, hidden: str, names: Iterable[str]) -> None:
    """Takes directories out of sight, all of them in one step; durable when it returns."""
    marks = _read(storage, hidden)
    marks |= {name: _identity(storage, os.path.join(root, name)) for name in names}
    storage.make_directory(hidden)
    _write(storage, hidden, marks)


def unhide(storage: Storage, hidden: str, names: Iterable[str]) -> None:
    """Forgets directories that are gone, or are to be seen again."""
    gone = set(names)
    marks = _read(storage, hidden)
    left = {name: mark for name, mark in marks.items() if name not in gone}
    if left != marks:
        _write(storage, hidden, left)


def hidden_names(storage: Storage, root: str, hidden: str) -> set[str]:
    """Returns the names under which there is what counts no more."""
    marks = _read(storage, hidden)
    return {
        name for name, mark in marks.items() if _is_or_was(storage, os.path.join(root, name), mark)
    }


def finish(storage: Storage, root: str, hidden: str) -> list[str]:
    """Removes what the journal names; only the holder of the lock may call it.

    Returns:
        What was done, one line each, for the log. What cannot be removed stays out of sight.
    """
    names = sorted(hidden_names(storage, root, hidden))
    there = [name for name in names if storage.exists(os.path.join(root, name))]
    failures = remove(storage, root, hidden, there)
    unhide(storage, hidden, _read(storage, hidden).keys() - failures.keys())
    return [
        f"removed {name}, whose removal was cut"
        if name not in failures
        else f"{name} cannot be removed and stays out of sight: {failures[name]}"
        for name in there
    ]


def _identity(storage: Storage, path: str) -> str:
    """What tells a commit from any other: its record and the digest of that; empty for none."""
    for file in (records.EXTENSION_FILE, orbax.CHECKPOINT_METADATA_FILE):
        if (digest := _digest(storage, os.path.join(path, file))) is not None:
            return f"{file} {digest}"
    return ""


def _is_or_was(storage: Storage, path: str, mark: str) -> bool:
    """Whether a directory is the one that was marked, or what is left of it."""
    file, _, digest = mark.partition(" ")
    if not file:
        return _identity(storage, path) == ""
    return _digest(storage, os.path.join(path, file)) in (None, digest)


def _digest(storage: Storage, path: str) -> str | None:
    try:
        return records.digest_hex(storage.read(path))
    except errors.StorageError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _read(storage: Storage, hidden: str) -> dict[str, str]:
    path = os.path.join(hidden, _JOURNAL)
    if not storage.exists(path):
        return {}
    try:
        data = storage.read(path)
    except errors.StorageError as error:
        if error.errno == errno.ENOENT:  # the writer has just finished
            return {}
        raise
    try:
        record: Mapping[str, str] = plain_json.parse(data)["names"]
        marks = {str(name): str(mark) for name, mark in record.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.CorruptCheckpointError(
            f"{path}: unreadable journal of steps being removed ({error}). Look at the directory "
            "and remove the file.",
            path=path,
        ) from error
    for name in marks:
        if "/" in name or name in ("", ".", ".."):
            raise errors.CorruptCheckpointError(
                f"{path}: {name!r} is not a name inside the directory.", path=path
            )
    return marks


def _write(storage: Storage, hidden: str, marks: Mapping[str, str]) -> None:
    path = os.path.join(hidden, _JOURNAL)
    if marks:
        storage.replace(path, json.dumps({"names": dict(marks)}).encode())
    else:
        storage.remove(path)
        storage.sync_directory(hidden)
