"""Making directories and trees durable, and visible to every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from functional_ckpt import errors
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.queries import exists

_SETTLE_SECONDS = 2.0


def makedirs_durable(storage: Storage, path: str) -> None:
    """Creates a directory that will hold durable files, and its parents, durably."""
    missing: list[str] = []
    above = path
    while not exists(storage, above):
        missing.append(above)
        parent = os.path.dirname(above)
        if parent in ("", above):  # a relative path, or a URI of another store
            raise errors.UsageError(
                f"{path}: not a path in {type(storage).__name__}; give an absolute path, or the "
                "storage that the URI is in.",
                path=path,
            )
        above = parent
    storage.make_directory(path)
    for each in reversed(missing):
        storage.sync(os.path.dirname(each))


def sync_tree(storage: Storage, directory: str, files: Iterable[str]) -> None:
    """Makes `files` (relative paths) and all their parent directories up to `directory` durable.

    All files are written before the first is synced: that sync also flushes their metadata.
    """
    files = tuple(files)
    for name in files:
        storage.sync(os.path.join(directory, name))
    for folder in _folders(files):
        storage.sync(os.path.join(directory, folder) if folder else directory)


def _folders(files: Iterable[str]) -> list[str]:
    """Returns every directory above the files, deepest first; the top is the empty string."""
    found = {""}
    for name in files:
        while name := os.path.dirname(name):
            found.add(name)
    return sorted(found, key=lambda name: (not name, -name.count("/"), name))


def check_visible(storage: Storage, path: str, rank: int, *, creator: int = 0) -> None:
    """Raises `CoordinationError` if `rank` cannot see the directory that another rank has created.

    Network file systems may cache that a name did not exist. Listing the parent refreshes the
    cache.
    """
    parent, name = os.path.split(path)
    deadline = time.monotonic() + _SETTLE_SECONDS
    while name not in storage.list(parent) or not exists(storage, path):
        if time.monotonic() >= deadline:
            raise errors.CoordinationError(
                f"Rank {rank} cannot see {path}, created by rank {creator}. All ranks must use the "
                "same directory on a shared file system.",
                ranks=(rank,),
                path=path,
            )
        time.sleep(_SETTLE_SECONDS / 20)
