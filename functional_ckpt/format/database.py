"""Databases of arrays: opening TensorStore for reading and writing, and its errors.

One item is one OCDBT database of zarr v3 arrays. Only this folder imports tensorstore.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import MAX_INLINE_BYTES, ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.ocdbt import MANIFEST
from functional_ckpt.format.step_files import check_content
from functional_ckpt.format.tuning import MAX_NODE_BYTES, TREE_CACHE_BYTES
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.paths import check_arrays_path
from functional_ckpt.storage.queries import read_optional

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
_SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
NO_CACHE = {"total_bytes_limit": 0}
_CONFIG = {
    "compression": {"id": "zstd"},
    "max_inline_value_bytes": MAX_INLINE_BYTES,
    "max_decoded_node_bytes": MAX_NODE_BYTES,
}


# Every write and every open makes a context of its own: databases opened through one context share
# a cache, which would remember a deleted or overwritten step. Copying from a child to its parent
# needs both to be opened with the same context.


_user_pid: int | None = None


def check_process() -> None:
    """Refuses to use TensorStore where it would abort the process.

    Raises:
        ForkedError: This process was forked from one that had used TensorStore.
    """
    global _user_pid
    if _user_pid is None:
        _user_pid = os.getpid()
    if _user_pid != os.getpid():
        raise errors.ForkedError(
            "This process was forked from one that had saved or restored a checkpoint, and cannot "
            "do so itself; start it with the spawn method, or save and restore in the parent."
        )


def write_context(storage: Storage) -> Any:
    """For writing and merging: the caller syncs the files."""
    check_process()
    return ts.Context(
        {"file_io_sync": False, "cache_pool": NO_CACHE, **storage.tensorstore.context()}
    )


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


def clear_error(storage: Storage, path: str, error: Exception) -> errors.CheckpointError:
    """Converts TensorStore's write error to a `StorageError`, with `errno` if it has one."""
    text = storage.tensorstore.redact(str(error))
    for code in _SYSTEM_ERRORS:
        if os.strerror(code) in text:
            return errors.StorageError(
                f"Cannot write {path}: {os.strerror(code)} [errno {code}].", errno=code, path=path
            )
    return errors.StorageError(f"TensorStore failed in {path}: {text.splitlines()[0]}", path=path)


def open_database(storage: Storage, directory: str, context: Any) -> Any:
    """Returns a database to write into, made when it is not there."""
    spec = {"driver": "ocdbt", "base": storage.tensorstore.kvstore(directory), "config": _CONFIG}
    try:
        return ts.KvStore.open(spec, context=context).result()
    except REFUSALS as error:
        raise clear_error(storage, directory, error) from error


def open_for_reading(
    directory: str, storage: Storage, files: Mapping[str, FileRecord] | None = None
) -> Database:
    """Opens an item's database.

    Raises:
        CorruptCheckpointError: There is no readable database.
    """
    read_manifest(storage, directory, (files or {}).get(MANIFEST))
    spec = {"driver": "ocdbt", "base": storage.tensorstore.kvstore(directory)}
    context = read_context(storage)
    try:
        store = ts.KvStore.open(spec, context=context).result()
        return Database(storage, directory, store, context)
    except REFUSALS as error:
        raise _read_error(storage, directory, MANIFEST, error) from error


def read_manifest(storage: Storage, directory: str, expected: FileRecord | None) -> bytes:
    """Returns the manifest of an item's database.

    Raises:
        CorruptCheckpointError: There is none, or it is not the recorded one.
    """
    check_arrays_path(f"/{os.path.basename(directory)}")
    path = os.path.join(directory, MANIFEST)
    data = read_optional(storage, path)
    if data is None:
        raise errors.CorruptCheckpointError(
            f"{directory}: {MANIFEST} is missing; the item's arrays cannot be found.",
            path=directory,
        )
    if expected is not None:
        check_content(path, data, expected)
    return data


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


def open_array(store: Any, name: str, spec: ArraySpec, grid: ChunkGrid, context: Any) -> Any:
    """Returns a zarr3 array described by us: its stored metadata is neither read nor written."""
    kvstore = store / key_prefix(name)
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore.spec().to_json(),
            "metadata": orbax.zarr3_metadata(spec, grid.chunk_shape),
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
            "cache_pool": NO_CACHE,  # chunks go where they are wanted, not into a cache as well
        },
        open=True,
        assume_metadata=True,
        context=context,
        transaction=store.transaction,
    ).result()
