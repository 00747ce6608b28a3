"""Queries about paths of any store, built on `Storage`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from functional_ckpt import errors
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.system_errors import is_absence

# Small requests that are worth sending to a store at the same time.
NUM_REQUESTS = 16


def exists(storage: Storage, path: str) -> bool:
    """Returns whether `path` exists, even as a dangling link."""
    return storage.stat(path) is not None


def is_directory(storage: Storage, path: str) -> bool:
    """Returns whether a directory, or a link to one, is at `path`."""
    found = storage.stat(path, follow=True)
    return found is not None and found.kind == "a directory"


def is_link(storage: Storage, path: str) -> bool:
    """Returns whether a link, or an object that may be one, is at `path`."""
    found = storage.stat(path)
    return found is not None and found.is_link


def kind(storage: Storage, path: str, *, follow: bool = False) -> str:
    """Returns the kind of a path, for messages: `a file`, ..., `nothing`."""
    found = storage.stat(path, follow=follow)
    return "nothing" if found is None else found.kind


def read_optional(storage: Storage, path: str) -> bytes | None:
    """Returns the content of a file; None if it does not exist."""
    try:
        return storage.read(path)
    except errors.StorageError as error:
        if is_absence(error):
            return None
        raise


def modified_ns(storage: Storage, path: str) -> int:
    """Returns the time of the last change, nanoseconds since the epoch; 0 if unknown.

    A directory of an object store is as new as the newest object below it.
    """
    found = storage.stat(path, follow=True)
    if found is None or found.modified_ns or storage.objects is None:
        return 0 if found is None else found.modified_ns
    return max((each.modified_ns for each in storage.walk(path).values()), default=0)


def age_seconds(storage: Storage, path: str) -> float:
    """Returns the time since the last change of a file; zero if it is absent."""
    found = storage.stat(path)
    return 0.0 if found is None else time.time() - found.modified_ns / 1e9


def sizes(storage: Storage, path: str) -> dict[str, int]:
    """Returns the size of every file below `path`, by its path relative to that."""
    return {name: found.size_bytes for name, found in storage.walk(path).items()}


def total_bytes(storage: Storage, path: str) -> int:
    """Returns the sum of the sizes of all files below `path`."""
    return sum(found.size_bytes for found in storage.walk(path).values())


def run_requests(storage: Storage, tasks: Sequence[Callable[[], None]]) -> None:
    """Runs tasks that read small files: many at a time in an object store, else one by one."""
    run_in_threads(tasks, 1 if storage.objects is None else NUM_REQUESTS)


class Space(NamedTuple):
    """The disk space of a directory.

    Attributes:
        size_bytes: The size of its files.
        added_bytes: Of those that are not in a directory before it.
        freed_bytes: Of those that are in no other directory.
    """

    size_bytes: int
    added_bytes: int
    freed_bytes: int


def space(storage: Storage, path: str, known: set[object]) -> Space:
    """Returns the space of a directory, whose files may have other names elsewhere.

    Args:
        storage: The store.
        path: The directory.
        known: The identities of the files before it; those of this one are added.
    """
    size_bytes = added_bytes = freed_bytes = 0
    for found in storage.walk(path).values():
        size_bytes += found.size_bytes
        if found.identity is None or found.identity not in known:
            added_bytes += found.size_bytes
        if found.num_links == 1:
            freed_bytes += found.size_bytes
        known.add(found.identity)
    return Space(size_bytes, added_bytes, freed_bytes)


def check_no_links(storage: Storage, root: str, name: str) -> None:
    """Raises `CorruptCheckpointError` if a folder between a directory and its file is a link."""
    if storage.objects is not None:
        return  # which has no folders
    path = root
    for part in name.split("/")[:-1]:
        path = f"{path}/{part}"
        if kind(storage, path) == "a link":
            raise irregular(path, "a link", "a directory")


def check_ordinary(storage: Storage, path: str) -> None:
    """Raises `CorruptCheckpointError` for anything but a regular file or a directory."""
    if storage.objects is None and (found := kind(storage, path)) in ("a link", "a special file"):
        raise irregular(path, found, "a file or a directory")


def regular_sizes(storage: Storage, path: str) -> dict[str, int] | None:
    """As `sizes`; raises `CorruptCheckpointError` for links and special files.

    Returns None for an object store, which has neither.
    """
    if storage.objects is not None:
        return None
    found = storage.stat(path)
    if found is not None and found.kind == "a link":
        raise irregular(path, found.kind, "a directory")
    entries = storage.walk(path)
    for name, entry in entries.items():
        if entry.kind != "a file":
            raise irregular(f"{path}/{name}", entry.kind)
    return {name: entry.size_bytes for name, entry in entries.items()}


def irregular(
    path: str, kind: str, expected: str = "a regular file"
) -> errors.CorruptCheckpointError:
    """Returns the error for a link or a special file where none may be."""
    advice = ""
    if kind == "a link":
        advice = " Links in a checkpoint are not followed; copy it with its files: cp -rL."
    return errors.CorruptCheckpointError(
        f"{path}: expected {expected}, got {kind}.{advice}", path=path
    )
