"""Chunks into databases, and the children of an item merged into one.

A writer spreads its chunks over *children* of the item's database, because one writer per database
is TensorStore's bottleneck; the primary merges them by copying key ranges, which copies no data.
Durability is the caller's: TensorStore does not sync, and every file is synced once before the
commit.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.digests import digest_blocks
from functional_ckpt.core.arrays.spec import Array, ArraySpec, Box, numpy_dtype
from functional_ckpt.core.records import orbax
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.database import (
    REFUSALS,
    clear_error,
    open_array,
    open_database,
    write_context,
)
from functional_ckpt.format.tuning import MAX_COPIED_BYTES, SMALL_CHUNK_BYTES
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.base import Storage

Digests: TypeAlias = "dict[str, dict[int, str]]"
"""Array name -> position of a chunk in C order -> its digests."""


class ArrayWrite(NamedTuple):
    """One region of one array, to be written.

    Attributes:
        name: The array's name.
        spec: The array.
        grid: Its chunks.
        box: The region `data` holds; its edges are on the grid, or at the array's end.
        data: Host memory of the region; may be strided.
        writes_metadata: Whether this writer also writes the array's metadata.
        is_stable: Whether `data` does not change until the write is done. If it may, its digest is
            taken of a copy.
        on_copied: Called with the number of bytes of `data` that are no longer needed, if the
            caller waits to change them; on any thread.
    """

    name: str
    spec: ArraySpec
    grid: ChunkGrid
    box: Box
    data: Array
    writes_metadata: bool = True
    is_stable: bool = False
    on_copied: Callable[[int], None] | None = None


def child_names(rank: int, num_children: int) -> list[str]:
    """Directories of a writer's databases; Orbax ignores the names and follows the merged tree."""
    return [f"ocdbt.process_{rank}_{index}" for index in range(num_children)]


def write_arrays(
    storage: Storage,
    item_directory: str,
    children: Sequence[str],
    arrays: Sequence[ArrayWrite],
    scalars: Iterable[tuple[str, ArraySpec, object]] = (),
) -> Digests:
    """Writes arrays into the databases `children` of an item, spreading the chunks evenly by bytes.

    Children are directories relative to the item; `[""]` writes into the item's own database.
    Scalars are arrays of one chunk, given by value.

    Returns:
        The digests of every chunk written.

    Raises:
        StorageError: The file system refused.
    """
    paths = [os.path.join(item_directory, child) if child else item_directory for child in children]
    for path in paths:
        storage.make_directory(path, parents=False)
    context = write_context(storage)
    databases = [_ChildDatabase(storage, path, context) for path in paths]
    digests: Digests = {}
    tasks: list[Callable[[], None]] = []
    batches = [tasks]
    copied_bytes = 0
    for array in arrays:
        storage.tensorstore.check_writable(os.path.join(item_directory, array.name))
        place = min(databases, key=lambda database: database.size_bytes)
        if array.writes_metadata:
            place.put_metadata(array.name, array.spec, array.grid.chunk_shape)
        found = digests.setdefault(array.name, {})
        for index in array.grid.indices(array.box):
            place = min(databases, key=lambda database: database.size_bytes)
            num_bytes = array.grid.box(index).num_elements * array.spec.itemsize_bytes
            place.size_bytes += num_bytes
            copied_bytes += 0 if array.is_stable else num_bytes
            if copied_bytes > MAX_COPIED_BYTES:
                copied_bytes, tasks = num_bytes, []
                batches.append(tasks)
            tasks.append(functools.partial(_write_chunk, place, array, index, found))
    for name, spec, value in scalars:
        databases[0].put_scalar(name, spec, value)
    try:
        for tasks in batches:
            run_in_threads(tasks)
            storage.tensorstore.check_writable(item_directory)
            for database in databases:
                database.start_commit()
            for database in databases:
                database.finish_commit()
        storage.tensorstore.flush(item_directory)
    except REFUSALS as error:
        if isinstance(error, errors.CheckpointError):
            raise
        raise clear_error(storage, item_directory, error) from error
    return digests


class _ChildDatabase:
    """A database under construction: few transactions, few commits, few files."""

    def __init__(self, storage: Storage, directory: str, context: Any) -> None:
        self.directory = directory
        self.size_bytes = 0
        self._context = context
        self._database = open_database(storage, directory, context)
        self._lock = threading.Lock()
        self._commit: Any = None
        self._begin()

    def _begin(self) -> None:
        self._transaction = ts.Transaction()
        self._store = self._database.with_transaction(self._transaction)
        self._arrays: dict[str, Any] = {}
        self._writes: list[Any] = []

    def put(self, key: str, value: bytes) -> None:
        self._writes.append(self._store.write(key, value))

    def put_metadata(self, name: str, spec: ArraySpec, chunk_shape: tuple[int, ...]) -> None:
        metadata = orbax.zarr3_metadata(spec, chunk_shape)
        self.put(f"{key_prefix(name)}zarr.json", json.dumps(metadata).encode())

    def put_scalar(self, name: str, spec: ArraySpec, value: object) -> None:
        self.put_metadata(name, spec, spec.shape)
        data = np.array(value, numpy_dtype(spec.dtype)).tobytes()
        self.put(f"{key_prefix(name)}{orbax.only_chunk(spec)}", data)

    def put_array(self, array: ArrayWrite, box: Box, data: Array) -> None:
        """Writes a region through zarr; `data` is referenced until the commit is done."""
        with self._lock:
            store = self._arrays.get(array.name)
            if store is None:
                store = open_array(self._store, array.name, array.spec, array.grid, self._context)
                self._arrays[array.name] = store
        write = store[box.slices()].write(data, can_reference_source_data_indefinitely=True)
        self._writes.append(write.copy)

    def start_commit(self) -> None:
        for write in self._writes:
            write.result()
        self._commit = self._transaction.commit_async()

    def finish_commit(self) -> None:
        self._commit.result()
        self._begin()


def _write_chunk(
    database: _ChildDatabase, array: ArrayWrite, index: tuple[int, ...], found: dict[int, str]
) -> None:
    box = array.grid.box(index)
    data = array.data[box.relative_to(array.box.offset).slices()]
    if not array.is_stable:  # unstable data is digested as it is written
        data = data.copy()
    elif not data.flags.c_contiguous:
        data = np.ascontiguousarray(data)  # bounded: one chunk per thread
    found[array.grid.position(index)] = digest_blocks(data.reshape(-1).view(np.uint8).data)
    if data.nbytes <= SMALL_CHUNK_BYTES:
        key = f"{key_prefix(array.name)}{array.grid.key(index)}"
        database.put(key, padded(data, array.grid).tobytes())
    else:
        database.put_array(array, box, data)


def padded(data: Array, grid: ChunkGrid) -> Array:
    """Returns an edge chunk with zeros up to the full chunk shape, as zarr stores it."""
    if data.shape == grid.chunk_shape:
        return data
    padded = np.zeros(grid.chunk_shape, data.dtype)
    padded[tuple(slice(n) for n in data.shape)] = data
    return padded


def join_digests(parts: Iterable[Digests]) -> dict[str, str]:
    """Returns the digests of complete arrays from the writers' results, chunks in C order."""
    first, *others = parts
    merged = first
    if others:
        merged = {name: dict(chunks) for name, chunks in first.items()}
    for part in others:
        for name, chunks in part.items():
            merged.setdefault(name, {}).update(chunks)
    return {
        name: "".join([chunks[place] for place in sorted(chunks)])
        for name, chunks in merged.items()
    }


def merge_children(
    storage: Storage,
    item_directory: str,
    children: Sequence[str],
    tied: Mapping[str, tuple[str, ChunkGrid]],
) -> None:
    """Makes every child's arrays visible in the item's own database, without copying data.

    Args:
        storage: Its files.
        item_directory: The item.
        children: The children; none when everything was written into the item's own database.
        tied: Name of a tied leaf -> name and grid of the array that holds its bytes.
    """
    storage.tensorstore.check_writable(item_directory)
    try:
        context = write_context(storage)
        parent = open_database(storage, item_directory, context)
        if children:
            transaction = ts.Transaction(atomic=True)
            target = parent.with_transaction(transaction)
            for child in children:
                path = os.path.join(item_directory, child)
                database = open_database(storage, path, context)
                database.experimental_copy_range_to(target).result()
            transaction.commit_sync()
        if tied:
            _copy_tied(parent, tied)
        storage.tensorstore.flush(item_directory)
    except REFUSALS as error:
        raise clear_error(storage, item_directory, error) from error


def _copy_tied(parent: Any, tied: Mapping[str, tuple[str, ChunkGrid]]) -> None:
    """A second range of keys over the same bytes, so that every reader sees both names."""
    transaction = ts.Transaction(atomic=True)
    target = parent.with_transaction(transaction)
    copies: list[Any] = []
    for name, (owner, grid) in tied.items():
        # Exact keys, not a prefix: the name of another array may start with this one's and a slash.
        for key in ("zarr.json", *map(grid.key, grid.indices())):
            one = ts.KvStore.KeyRange(key, key + "\0")
            source, destination = parent / key_prefix(owner), target / key_prefix(name)
            copies.append(source.experimental_copy_range_to(destination, source_range=one))
    for copy in copies:
        copy.result()
    transaction.commit_sync()
