"""Databases of arrays: how TensorStore is opened, and what reading and writing share.

One item is one OCDBT database of zarr v3 arrays. `arrays_write` puts chunks into it and
`arrays_read` takes them out; these modules are the only importers of tensorstore. Two roads lead
into a database and out of it, with the same bytes on disk: large chunks go through a zarr array
without being copied, small ones straight through the key-value store, which costs a tenth per
array.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Any, TypeAlias

import numpy as np
import tensorstore as ts
import xxhash

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, MAX_INLINE_BYTES, ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records import orbax
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage

__all__ = [
    "NO_CACHE",
    "REFUSALS",
    "SMALL_CHUNK_BYTES",
    "Database",
    "as_bytes",
    "check_process",
    "clear_error",
    "corrupt",
    "digest_blocks",
    "open_array",
    "open_database",
    "open_files_for_reading",
    "open_for_reading",
    "read_context",
    "write_context",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

# What TensorStore raises: its statuses come as Python's errors of the nearest meaning.
REFUSALS = (
    *(ArithmeticError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
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


# A context is made anew for every write and every open: databases opened through one object share
# a cache, and a step that was deleted or overwritten must not be remembered. Copying from a child
# to its parent needs both to be opened with the same object.


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
    """For writing and merging: what is written is synced by the caller."""
    check_process()
    return ts.Context({"file_io_sync": False, "cache_pool": NO_CACHE, **storage.context()})


def read_context(storage: Storage) -> Any:
    """For reading: by memory map."""
    check_process()
    # Reads by memory map go straight from the page cache into the destination: 8-17 GiB/s against
    # 1-2. The cache is for the nodes of the tree (as large as they are): without it every read
    # decodes its node anew, which for 20,000 small arrays takes 9 ms a read instead of 0.3.
    cache = {"total_bytes_limit": _TREE_CACHE_BYTES}
    how = {"file_io_mode": {"mode": "memmap"}, "cache_pool": cache}
    return ts.Context({**how, **storage.context()})


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
    """TensorStore's refusal to write as one of ours, with the system's `errno` where it has one."""
    text = storage.redact(str(error))
    for code in _SYSTEM_ERRORS:
        if os.strerror(code) in text:
            return errors.StorageError(
                f"Cannot write {path}: {os.strerror(code)} [errno {code}].", errno=code, path=path
            )
    return errors.StorageError(f"TensorStore failed in {path}: {text.splitlines()[0]}", path=path)


def open_database(storage: Storage, directory: str, context: Any) -> Any:
    """A database to write into, made when it is not there."""
    spec = {"driver": "ocdbt", "base": storage.kvstore(directory), "config": _CONFIG}
    try:
        return ts.KvStore.open(spec, context=context).result()
    except REFUSALS as error:
        raise clear_error(storage, directory, error) from error


def open_for_reading(directory: str, storage: Storage = _LOCAL) -> Database:
    """The item's database, for `read_array`.

    Raises:
        CorruptCheckpointError: There is no readable database.
    """
    if not storage.exists(os.path.join(directory, "manifest.ocdbt")):
        raise errors.CorruptCheckpointError(
            f"{directory}: manifest.ocdbt is missing; the item's arrays cannot be found.",
            path=directory,
        )
    spec = {"driver": "ocdbt", "base": storage.kvstore(directory)}
    context = read_context(storage)
    try:
        store = ts.KvStore.open(spec, context=context).result()
        return Database(storage, directory, store, context)
    except REFUSALS as error:
        raise _corrupt(storage, directory, "manifest.ocdbt", error) from error


def corrupt(database: Database, what: str, error: Exception) -> errors.CorruptCheckpointError:
    """What TensorStore's failure to read means to the caller."""
    return _corrupt(database.storage, database.directory, what, error)


def _corrupt(
    storage: Storage, directory: str, what: str, error: Exception
) -> errors.CorruptCheckpointError:
    text = storage.redact(str(error).splitlines()[0])
    return errors.CorruptCheckpointError(
        f"{directory}: {what} cannot be read: {text}", path=directory
    )


def open_files_for_reading(directory: str, storage: Storage = _LOCAL) -> Database:
    """An item whose arrays are plain zarr files (Orbax with OCDBT off)."""
    context = read_context(storage)
    store = ts.KvStore.open(storage.kvstore(directory), context=context).result()
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
