"""Databases of arrays: opening TensorStore, and the parts shared by reading and writing.

One item is one OCDBT database of zarr v3 arrays. `write_tensorstore` and `read_tensorstore` write
and read chunks; with this module they are the only importers of tensorstore. There are two paths
into a database and out of it, with the same bytes on disk: large chunks go through a zarr array
without being copied, small ones straight through the key-value store, which costs a tenth per
array.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import tensorstore as ts
import xxhash

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, MAX_INLINE_BYTES, ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.step_files import check_content, read_optional
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.paths import check_arrays_path

__all__ = [
    "NO_CACHE",
    "REFUSALS",
    "SMALL_CHUNK_BYTES",
    "BlockDigests",
    "Database",
    "as_bytes",
    "check_process",
    "clear_error",
    "digest_blocks",
    "open_array",
    "open_database",
    "open_files_for_reading",
    "open_for_reading",
    "read_error",
    "read_context",
    "write_context",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

# TensorStore's statuses are raised as the nearest Python errors.
REFUSALS = (
    *(ArithmeticError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
_MANIFEST = "manifest.ocdbt"
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
# Below this a chunk is copied into the key-value store; above, zarr writes it without a copy.
SMALL_CHUNK_BYTES = 128 * 1024
_TREE_CACHE_BYTES = 2**30
_LOCAL = LocalStorage()
NO_CACHE = {"total_bytes_limit": 0}
_CONFIG = {
    "compression": {"id": "zstd"},
    "max_inline_value_bytes": MAX_INLINE_BYTES,
    "max_decoded_node_bytes": 100_000_000,
}


# A new context is made for every write and open: databases opened through one object share a cache,
# and a step that was deleted or overwritten must not be remembered. Copying from a child to its
# parent needs both to be opened with the same object.


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
    """For reading: by memory map."""
    check_process()
    # Reads by memory map go straight from the page cache into the destination: 8-17 GiB/s against
    # 1-2. The cache is for the nodes of the tree (as large as they are): without it every read
    # decodes its node again, which for 20,000 small arrays takes 9 ms a read instead of 0.3.
    cache = {"total_bytes_limit": _TREE_CACHE_BYTES}
    how = {"file_io_mode": {"mode": "memmap"}, "cache_pool": cache}
    return ts.Context({**how, **storage.tensorstore.context()})


class Database:
    """An item's arrays, open for reading.

    Attributes:
        storage: The store that it is in.
        directory: Where the item is.
        store: The key-value store.
        context: The TensorStore context it was opened with.
        arrays: Arrays opened so far, by name.
        bytes_asked: How many bytes of chunks were asked of the store so far.
        requested: Reads of small chunks that are under way, by key.
    """

    def __init__(self, storage: Storage, directory: str, store: Any, context: Any) -> None:
        self.storage = storage
        self.directory = directory
        self.store = store
        self.context = context
        self.arrays: dict[str, Any] = {}
        self.bytes_asked = 0
        self.requested: dict[str, Any] = {}
        self._lock = threading.Lock()

    def count(self, num_bytes: int) -> None:
        """Adds to `bytes_asked`."""
        with self._lock:
            self.bytes_asked += num_bytes


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
    """A database to write into, made when it is not there."""
    spec = {"driver": "ocdbt", "base": storage.tensorstore.kvstore(directory), "config": _CONFIG}
    try:
        return ts.KvStore.open(spec, context=context).result()
    except REFUSALS as error:
        raise clear_error(storage, directory, error) from error


def open_for_reading(
    directory: str, storage: Storage = _LOCAL, files: Mapping[str, FileRecord] | None = None
) -> Database:
    """The item's database, for `read_array`.

    Args:
        directory: The item.
        storage: The store that it is in.
        files: The item's file records, if it has a record.

    Raises:
        CorruptCheckpointError: There is no readable database.
    """
    _check_manifest(storage, directory, (files or {}).get(_MANIFEST))
    spec = {"driver": "ocdbt", "base": storage.tensorstore.kvstore(directory)}
    context = read_context(storage)
    try:
        store = ts.KvStore.open(spec, context=context).result()
        return Database(storage, directory, store, context)
    except REFUSALS as error:
        raise _read_error(storage, directory, _MANIFEST, error) from error


def _check_manifest(storage: Storage, directory: str, expected: FileRecord | None) -> None:
    """Raises `CorruptCheckpointError` unless there is a manifest, on a disk as it is recorded."""
    path = os.path.join(directory, _MANIFEST)
    data = None
    if storage.files is not None:
        check_arrays_path(directory)
        data = read_optional(storage, path)
    if data is None and not queries.exists(storage, path):
        raise errors.CorruptCheckpointError(
            f"{directory}: {_MANIFEST} is missing; the item's arrays cannot be found.",
            path=directory,
        )
    if data is not None and expected is not None:
        check_content(path, data, expected)


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
    """The errno of a refusal; None for an error that is about the bytes."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if found := _OS_ERROR.search(text):
        code = int(found[1])
        return None if code in _DAMAGE_ERRORS else code
    return next((code for status, code in _STATUSES.items() if text.startswith(status)), None)


def open_files_for_reading(directory: str, storage: Storage = _LOCAL) -> Database:
    """An item whose arrays are plain zarr files (Orbax with OCDBT off)."""
    context = read_context(storage)
    store = ts.KvStore.open(storage.tensorstore.kvstore(directory), context=context).result()
    return Database(storage, directory, store, context)


def open_array(store: Any, name: str, spec: ArraySpec, grid: ChunkGrid, context: Any) -> Any:
    """A zarr3 array described by us: its stored metadata is neither read nor written."""
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


def as_bytes(data: Array) -> memoryview:
    """The memory of a contiguous array as flat bytes."""
    flat: Any = data.reshape(-1).view(np.uint8)  # numpy's stubs say nothing of buffers
    return memoryview(flat)


def digest_blocks(data: Array) -> str:
    """16 hex digits for every `DIGEST_BLOCK_BYTES` of a contiguous array."""
    flat = as_bytes(data)
    return "".join(
        xxhash.xxh3_64_hexdigest(flat[start : start + DIGEST_BLOCK_BYTES])
        for start in range(0, len(flat), DIGEST_BLOCK_BYTES)
    )


class BlockDigests:
    """The result of `digest_blocks`, for bytes that arrive in pieces of any size."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._block = xxhash.xxh3_64()
        self._missing_bytes = DIGEST_BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Adds the next bytes."""
        start = 0
        while start < len(data):
            piece = data[start : start + self._missing_bytes]
            start += len(piece)
            if len(piece) == DIGEST_BLOCK_BYTES:
                self._found.append(xxhash.xxh3_64_hexdigest(piece))
                continue
            self._block.update(piece)
            self._missing_bytes -= len(piece)
            if not self._missing_bytes:
                self._end_block()

    def _end_block(self) -> None:
        self._found.append(self._block.hexdigest())
        self._block.reset()
        self._missing_bytes = DIGEST_BLOCK_BYTES

    def hexdigests(self) -> str:
        """16 hex digits for every block; nothing may be added after this."""
        if self._missing_bytes < DIGEST_BLOCK_BYTES:
            self._end_block()
        return "".join(self._found)
