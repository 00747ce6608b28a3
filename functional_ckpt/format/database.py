"""Databases of arrays: opening TensorStore for reading, and its errors.

One item is one OCDBT database of zarr v3 arrays. Only this folder imports tensorstore.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from typing import Any

import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.records.orbax import MANIFEST
from functional_ckpt.format.process import check_process
from functional_ckpt.format.step_files import read_manifest
from functional_ckpt.format.tuning import TREE_CACHE_BYTES
from functional_ckpt.storage.base import Storage

# TensorStore's statuses are raised as the nearest Python errors.
REFUSALS = (
    *(ArithmeticError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
# TensorStore ends the messages of system errors with their number.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# Missing files and non-files: damage in a checkpoint.
_DAMAGE_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
# Refusals of remote stores.
_STATUSES = {
    "RESOURCE_EXHAUSTED": errno.EAGAIN,
    "UNAVAILABLE": errno.EIO,
    "DEADLINE_EXCEEDED": errno.ETIMEDOUT,
    "PERMISSION_DENIED": errno.EACCES,
    "UNAUTHENTICATED": errno.EACCES,
    "ABORTED": errno.EIO,
}
NO_CACHE = {"total_bytes_limit": 0}
# Every open makes a context of its own: databases opened through one context share a cache, which
# would remember a deleted or overwritten step.


def read_context(storage: Storage) -> Any:
    """Returns a context for reading.

    Memory maps would read local files four times as fast; but a disk error under one kills the
    process (SIGBUS).
    """
    check_process()
    return ts.Context(
        {"cache_pool": {"total_bytes_limit": TREE_CACHE_BYTES}, **storage.tensorstore.context()}
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Database:
    """An item's arrays, open for reading."""

    storage: Storage
    directory: str
    store: Any
    context: Any


def open_for_reading(directory: str, storage: Storage) -> Database:
    """Opens an item's database.

    Raises:
        CorruptCheckpointError: There is no readable database.
    """
    read_manifest(storage, directory, None)
    spec = {"driver": "ocdbt", "base": storage.tensorstore.kvstore(directory)}
    context = read_context(storage)
    try:
        store = ts.KvStore.open(spec, context=context).result()
        return Database(storage, directory, store, context)
    except REFUSALS as error:
        raise _read_error(storage, directory, MANIFEST, error) from error


def read_error(database: Database, what: str, error: Exception) -> errors.CheckpointError:
    """Converts TensorStore's read errors."""
    return _read_error(database.storage, database.directory, what, error)


def _read_error(
    storage: Storage, directory: str, what: str, error: Exception
) -> errors.CheckpointError:
    """Distinguishes damaged bytes from errors of the system or the store."""
    text = storage.tensorstore.redact(
        str(error).splitlines()[0] if str(error) else type(error).__name__
    )
    code = _errno_of(error, text)
    if code is None:
        return errors.CorruptCheckpointError(
            f"{directory}: {what} cannot be read: {text}", path=directory
        )
    return errors.StorageError(
        f"Cannot read {what} in {directory}: {os.strerror(code)} [errno {code}] ({text}).",
        errno=code,
        path=directory,
    )


def _errno_of(error: Exception, text: str) -> int | None:
    """Returns the errno of a refusal; None for an error that is about the bytes."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if found := _OS_ERROR.search(text):
        code = int(found[1])
        return None if code in _DAMAGE_ERRORS else code
    return next((code for status, code in _STATUSES.items() if text.startswith(status)), None)


def open_files_for_reading(directory: str, storage: Storage) -> Database:
    """Returns an item whose arrays are plain zarr files (Orbax with OCDBT off)."""
    context = read_context(storage)
    store = ts.KvStore.open(storage.tensorstore.kvstore(directory), context=context).result()
    return Database(storage, directory, store, context)
