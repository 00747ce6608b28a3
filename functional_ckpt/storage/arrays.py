"""Arrays in OCDBT databases: the only importer of tensorstore.

One item is one OCDBT database. A writer puts chunks into one or more *children* of it (one writer per database
is TensorStore's bottleneck), and the primary merges the children by copying their key ranges, which copies no
data. Two roads lead into a database and out of it, with the same bytes on disk: large chunks go through a zarr3
array without being copied, small ones straight through the key-value store, which costs a tenth per array.

Durability is the caller's: TensorStore is told not to sync, and every file is synced once before the commit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorstore as ts
import xxhash

from functional_ckpt import errors
from functional_ckpt.core import orbax_format
from functional_ckpt.core.chunks import (
    DIGEST_BLOCK_BYTES,
    MAX_INLINE_BYTES,
    ChunkGrid,
    digest_offsets,
)
from functional_ckpt.core.spec import ArraySpec, Box, numpy_dtype
from functional_ckpt.core.structure import key_prefix
from functional_ckpt.storage.paths import LocalStorage

__all__ = [
    "ArrayRead",
    "ArrayWrite",
    "Database",
    "Digests",
    "check_process",
    "child_names",
    "join_digests",
    "merge_children",
    "open_files_for_reading",
    "open_for_reading",
    "read_array",
    "read_foreign_array",
    "read_part",
    "request_part",
    "run_in_threads",
    "stored_spec",
    "verify_part",
    "write_arrays",
]

Array: TypeAlias = "np.ndarray[Any, Any]"
Digests: TypeAlias = "dict[str, dict[int, str]]"
"""Array name -> place of a chunk in C order -> its digests."""

# Below this a chunk is copied into the key-value store; above, zarr writes it without a copy.
_SMALL_CHUNK_BYTES = 128 * 1024
_NUM_THREADS = 2
_TREE_CACHE_BYTES = 2**30
_NO_CACHE = {"total_bytes_limit": 0}
_CONFIG = {
    "compression": {"id": "zstd"},
    "max_inline_value_bytes": MAX_INLINE_BYTES,
    "max_decoded_node_bytes": 100_000_000,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArrayWrite:
    """One region of one array, to be written.

    Attributes:
        name: The array's name.
        spec: The whole array.
        grid: Its chunks.
        box: The region `data` holds; its edges lie on the grid, or at the array's end.
        data: Host memory of the region, unchanged until the write is done; may be strided.
        is_owner: Whether this writer also writes the array's metadata.
    """

    name: str
    spec: ArraySpec
    grid: ChunkGrid
    box: Box
    data: Array
    is_owner: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRead:
    """One region of one array, to be read.

    Attributes:
        name: The name under which the bytes are stored.
        spec: The whole array.
        grid: Its chunks.
        digests: 16 hex digits per digest block, or None to read unverified.
        box: The wanted region.
    """

    name: str
    spec: ArraySpec
    grid: ChunkGrid
    digests: str | None
    box: Box


# ------------------------------------------------------------------------------------ databases


# A context is made anew for every write and every open: databases opened through one object share a cache, and
# a step that was deleted or overwritten must not be remembered. Copying from a child to its parent needs both to
# be opened with the same object.


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


def _context() -> Any:
    check_process()
    return ts.Context({"file_io_sync": False, "cache_pool": _NO_CACHE})


def _read_context() -> Any:
    check_process()
    # Reads by memory map go straight from the page cache into the destination: 8-17 GiB/s against
    # 1-2. The cache is for the nodes of the tree (as large as they are): without it every read
    # decodes its node anew, which for 20,000 small arrays takes 9 ms a read instead of 0.3.
    cache = {"total_bytes_limit": _TREE_CACHE_BYTES}
    return ts.Context({"file_io_mode": {"mode": "memmap"}, "cache_pool": cache})


class Database:
    """An item's arrays, open for reading.

    Attributes:
        directory: Where the item is.
        store: The key-value store.
        context: The TensorStore context it was opened with.
        arrays: Arrays opened so far, by name.
        bytes_asked: How many bytes of chunks were asked of the store so far.
        requested: Reads of small chunks that are under way, by key.
    """

    def __init__(self, directory: str, store: Any, context: Any) -> None:
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


def _clear_errors(path: str, error: Exception) -> errors.CheckpointError:
    text = str(error)
    if "No space left" in text:
        import errno

        return errors.StorageError(
            f"Cannot write {path}: no space left on device.", errno=errno.ENOSPC, path=path
        )
    return errors.StorageError(f"TensorStore failed in {path}: {text.splitlines()[0]}", path=path)


def _open_database(directory: str, context: Any) -> Any:
    spec = {"driver": "ocdbt", "base": f"file://{directory}/", "config": _CONFIG}
    try:
        return ts.KvStore.open(spec, context=context).result()
    except (ValueError, OSError) as error:
        raise _clear_errors(directory, error) from error


def open_for_reading(directory: str) -> Database:
    """The item's database, for `read_array`.

    Raises:
        CorruptCheckpointError: There is no readable database.
    """
    if not os.path.exists(os.path.join(directory, "manifest.ocdbt")):
        raise errors.CorruptCheckpointError(
            f"{directory}: manifest.ocdbt is missing; the item's arrays cannot be found.",
            path=directory,
        )
    spec = {"driver": "ocdbt", "base": f"file://{directory}/"}
    context = _read_context()
    try:
        return Database(directory, ts.KvStore.open(spec, context=context).result(), context)
    except (ValueError, OSError) as error:
        raise _corrupt(directory, "manifest.ocdbt", error) from error


def _corrupt(directory: str, what: str, error: Exception) -> errors.CorruptCheckpointError:
    return errors.CorruptCheckpointError(
        f"{directory}: {what} cannot be read: {str(error).splitlines()[0]}", path=directory
    )


def child_names(rank: int, num_children: int) -> list[str]:
    """Directories of a writer's databases; Orbax ignores the names and follows the merged tree."""
    return [f"ocdbt.process_{rank}_{index}" for index in range(num_children)]


def run_in_threads(tasks: Sequence[Callable[[], None]], num_threads: int = _NUM_THREADS) -> None:
    """Runs every task; raises the first error after all threads have stopped.

    Plain threads, because executors refuse work while the interpreter shuts down, when the last commit of a
    program may still be under way.
    """
    if len(tasks) < 2:
        for task in tasks:
            task()
        return
    pending: Iterator[Callable[[], None]] = iter(tasks)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with lock:
                task = next(pending, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:  # handed to the caller below
                failures.append(error)

    threads: list[threading.Thread] = []
    for _ in range(min(num_threads, len(tasks)) - 1):
        thread = threading.Thread(target=work)
        try:
            thread.start()
        except RuntimeError:  # from Python 3.12 on, no thread starts while the interpreter ends
            break
        threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# ------------------------------------------------------------------------------------ writing


def write_arrays(
    storage: LocalStorage,
    item_directory: str,
    children: Sequence[str],
    arrays: Sequence[ArrayWrite],
    scalars: Iterable[tuple[str, ArraySpec, object]] = (),
) -> Digests:
    """Writes arrays into the databases `children` of an item, spreading the chunks evenly by bytes.

    Args:
        storage: Told of every array.
        item_directory: The item.
        children: Directories relative to the item; `[""]` writes into the item's own database.
        arrays: What to write.
        scalars: 0-dim arrays given by value: name, spec, value.

    Returns:
        The digests of every chunk written.

    Raises:
        StorageError: The file system refused.
    """
    paths = [os.path.join(item_directory, child) if child else item_directory for child in children]
    for path in paths:
        storage.make_directory(path)
    context = _context()
    databases = [_ChildDatabase(path, context) for path in paths]
    digests: Digests = {}
    tasks: list[Callable[[], None]] = []
    for array in arrays:
        storage.operation("write_array", os.path.join(item_directory, array.name))
        place = min(databases, key=lambda database: database.size_bytes)
        if array.is_owner:
            place.put_metadata(array.name, array.spec, array.grid.chunk_shape)
        found = digests.setdefault(array.name, {})
        for index in array.grid.indices(array.box):
            place = min(databases, key=lambda database: database.size_bytes)
            place.size_bytes += array.grid.box(index).num_elements * array.spec.itemsize_bytes
            tasks.append(functools.partial(_write_chunk, place, array, index, found))
    for name, spec, value in scalars:
        databases[0].put_scalar(name, spec, value)
    try:
        run_in_threads(tasks)
        storage.operation("commit_arrays", item_directory)
        for database in databases:
            database.start_commit()
        for database in databases:
            database.finish_commit()
    except (ValueError, OSError) as error:
        if isinstance(error, errors.CheckpointError):
            raise
        raise _clear_errors(item_directory, error) from error
    return digests


class _ChildDatabase:
    """A database under construction: everything goes into one transaction, one commit, few files."""

    def __init__(self, directory: str, context: Any) -> None:
        self.directory = directory
        self.size_bytes = 0
        self._context = context
        self._transaction = ts.Transaction()
        self._store = _open_database(directory, context).with_transaction(self._transaction)
        self._arrays: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._writes: list[Any] = []
        self._commit: Any = None

    def put(self, key: str, value: bytes) -> None:
        self._writes.append(self._store.write(key, value))

    def put_metadata(self, name: str, spec: ArraySpec, chunk_shape: tuple[int, ...]) -> None:
        metadata = orbax_format.zarr3_metadata(spec, chunk_shape)
        self.put(f"{key_prefix(name)}zarr.json", json.dumps(metadata).encode())

    def put_scalar(self, name: str, spec: ArraySpec, value: object) -> None:
        self.put_metadata(name, spec, ())
        self.put(f"{key_prefix(name)}c", np.array(value, numpy_dtype(spec.dtype)).tobytes())

    def put_array(self, array: ArrayWrite, box: Box, data: Array) -> None:
        """Writes a region through zarr; `data` is referenced, not copied, until the commit is done."""
        with self._lock:
            store = self._arrays.get(array.name)
            if store is None:
                store = _open_array(self._store, array.name, array.spec, array.grid, self._context)
                self._arrays[array.name] = store
        write = store[box.slices()].write(data, can_reference_source_data_indefinitely=True)
        self._writes.append(write.copy)

    def start_commit(self) -> None:
        for write in self._writes:
            write.result()
        self._commit = self._transaction.commit_async()

    def finish_commit(self) -> None:
        self._commit.result()


def _open_array(store: Any, name: str, spec: ArraySpec, grid: ChunkGrid, context: Any) -> Any:
    """A zarr3 array described by us: its stored metadata is neither read nor written."""
    kvstore = store / key_prefix(name)
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore.spec().to_json(),
            "metadata": orbax_format.zarr3_metadata(spec, grid.chunk_shape),
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
            "cache_pool": _NO_CACHE,  # chunks go where they are wanted, not into a cache as well
        },
        open=True,
        assume_metadata=True,
        context=context,
        transaction=store.transaction,
    ).result()


def _write_chunk(
    database: _ChildDatabase, array: ArrayWrite, index: tuple[int, ...], found: dict[int, str]
) -> None:
    box = array.grid.box(index)
    data = array.data[box.relative_to(array.box.offset).slices()]
    if not data.flags.c_contiguous:
        data = np.ascontiguousarray(data)  # bounded: one chunk per thread
    found[array.grid.position(index)] = _digest_blocks(data)
    if data.nbytes <= _SMALL_CHUNK_BYTES:
        key = f"{key_prefix(array.name)}{array.grid.key(index)}"
        database.put(key, _padded(data, array.grid).tobytes())
    else:
        database.put_array(array, box, data)


def _padded(data: Array, grid: ChunkGrid) -> Array:
    """An edge chunk with zeros up to the full chunk shape, as zarr stores it."""
    if data.shape == grid.chunk_shape:
        return data
    padded = np.zeros(grid.chunk_shape, data.dtype)
    padded[tuple(slice(n) for n in data.shape)] = data
    return padded


def as_bytes(data: Array) -> memoryview:
    """The memory of a contiguous array as flat bytes."""
    return memoryview(data.reshape(-1).view(np.uint8))


def _digest_blocks(data: Array) -> str:
    """16 hex digits for every `DIGEST_BLOCK_BYTES` of a contiguous array."""
    flat = as_bytes(data)
    return "".join(
        xxhash.xxh3_64_hexdigest(flat[start : start + DIGEST_BLOCK_BYTES])
        for start in range(0, len(flat), DIGEST_BLOCK_BYTES)
    )


def join_digests(parts: Iterable[Digests]) -> dict[str, str]:
    """The digests of whole arrays out of what the writers found, chunks in C order."""
    merged: Digests = {}
    for part in parts:
        for name, chunks in part.items():
            merged.setdefault(name, {}).update(chunks)
    return {
        name: "".join(chunks[place] for place in sorted(chunks)) for name, chunks in merged.items()
    }


def merge_children(
    storage: LocalStorage,
    item_directory: str,
    children: Sequence[str],
    tied: Mapping[str, tuple[str, ChunkGrid]],
) -> None:
    """Makes the arrays of every child visible in the item's own database, without copying their data.

    Args:
        storage: Told of the merge.
        item_directory: The item.
        children: The children; none when everything was written into the item's own database.
        tied: Name of a tied leaf -> name and grid of the array that holds its bytes.
    """
    storage.operation("merge_arrays", item_directory)
    try:
        context = _context()
        parent = _open_database(item_directory, context)
        if children:
            transaction = ts.Transaction(atomic=True)
            target = parent.with_transaction(transaction)
            for child in children:
                database = _open_database(os.path.join(item_directory, child), context)
                database.experimental_copy_range_to(target).result()
            transaction.commit_sync()
        if tied:
            _copy_tied(parent, tied)
    except (ValueError, OSError) as error:
        raise _clear_errors(item_directory, error) from error


def _copy_tied(parent: Any, tied: Mapping[str, tuple[str, ChunkGrid]]) -> None:
    """A second range of keys that refers to the same bytes, so that every reader sees both names."""
    transaction = ts.Transaction(atomic=True)
    target = parent.with_transaction(transaction)
    copies: list[Any] = []
    for name, (owner, grid) in tied.items():
        # Exact keys, not a prefix: the name of another array may begin with this one's and a slash.
        for key in ("zarr.json", *map(grid.key, grid.indices())):
            one = ts.KvStore.KeyRange(key, key + "\0")
            source, destination = parent / key_prefix(owner), target / key_prefix(name)
            copies.append(source.experimental_copy_range_to(destination, source_range=one))
    for copy in copies:
        copy.result()
    transaction.commit_sync()


# ------------------------------------------------------------------------------------ reading


def stored_spec(
    database: Database, name: str, *, is_zarr3: bool
) -> tuple[ArraySpec, Mapping[str, Any]]:
    """Shape and dtype of an array that another program wrote, checked before TensorStore sees them.

    Raises:
        CorruptCheckpointError: The metadata is missing, malformed, or of a dtype that cannot be read.
    """
    key = f"{key_prefix(name)}{'zarr.json' if is_zarr3 else '.zarray'}"
    try:
        data = database.store.read(key).result()
        if data.state != "value":
            raise ValueError("missing")
        record = json.loads(data.value)
        dtype = record["data_type"] if is_zarr3 else _zarr2_dtype(record["dtype"])
        if not isinstance(dtype, str):
            raise ValueError(f"dtype {dtype!r}")
        return ArraySpec(tuple(record["shape"]), dtype), record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise errors.CorruptCheckpointError(
            f"Metadata {key!r} of a stored array: {type(error).__name__}: {error}", key_path=name
        ) from error


def _zarr2_dtype(dtype: str) -> str:
    return np.dtype(dtype).name if dtype[:1] in "<>|" else dtype


def read_foreign_array(
    database: Database,
    name: str,
    destination: Array,
    *,
    box: Box,
    shape: tuple[int, ...],
    is_zarr3: bool,
    fills_missing: bool = False,
) -> None:
    """Fills `destination` with `box` of an array that another program wrote, whatever its codecs."""
    spec = {
        "driver": "zarr3" if is_zarr3 else "zarr",
        "fill_missing_data_reads": fills_missing,
        "kvstore": (database.store / key_prefix(name)).spec().to_json(),
        "cache_pool": _NO_CACHE,
    }
    try:
        store = ts.open(spec, open=True, read=True, context=database.context).result()
        if tuple(store.shape) != shape:
            raise ValueError(f"shape {tuple(store.shape)}, expected {shape}")
        ts.array(destination).write(store[box.slices()]).result()
    except (ValueError, OSError) as error:
        raise _corrupt(database.directory, f"array {name!r}", error) from error


def open_files_for_reading(directory: str) -> Database:
    """An item whose arrays are plain zarr files (Orbax with OCDBT off)."""
    context = _read_context()
    store = ts.KvStore.open(f"file://{directory}/", context=context).result()
    return Database(directory, store, context)


def read_array(database: Database, read: ArrayRead, destination: Array) -> None:
    """Fills `destination` with a region of an array and verifies every byte that it used.

    Args:
        database: From `open_for_reading`.
        read: What to read.
        destination: Host memory of the region's shape; may be strided.

    Raises:
        CorruptCheckpointError: A chunk is missing, of the wrong size, or does not match its digest.
    """
    for index in read.grid.indices(read.box):
        read_part(database, read, index, destination)


def request_part(database: Database, read: ArrayRead, index: tuple[int, ...]) -> None:
    """Asks for a small chunk ahead of `read_part`: many requests under way hide each one's latency."""
    chunk = read.grid.box(index)
    size_bytes = chunk.num_elements * read.spec.itemsize_bytes
    is_small = size_bytes <= _SMALL_CHUNK_BYTES and not read.grid.is_padded(index)
    if is_small and read.box.contains(chunk):
        key = f"{key_prefix(read.name)}{read.grid.key(index)}"
        database.requested[key] = database.store.read(key)


def read_part(
    database: Database, read: ArrayRead, index: tuple[int, ...], destination: Array
) -> None:
    """As `read_array`, for what one chunk contributes; parts may be read on several threads."""
    chunk = read.grid.box(index)
    common = chunk.intersect(read.box)
    if common is None:
        return
    part = destination[common.relative_to(read.box.offset).slices()]
    inside = common.relative_to(chunk.offset)
    if common == chunk and part.flags.c_contiguous:
        _read_chunk(database, read, index, part)
    elif (run := _run_in_chunk(read, index, inside)) is not None:
        part[...] = _read_run(database, read, index, *run, part)
    else:
        whole = np.empty(chunk.shape, destination.dtype)  # bounded: one chunk per thread
        _read_chunk(database, read, index, whole)
        part[...] = whole[inside.slices()]


def _run_in_chunk(read: ArrayRead, index: tuple[int, ...], inside: Box) -> tuple[int, int] | None:
    """First byte and one past the last of a region that is one run of a chunk's bytes, else None.

    A chunk that is cut off in a dim after the first is stored with gaps, so it is read whole.
    """
    shape = read.grid.box(index).shape
    if shape[1:] != read.grid.chunk_shape[1:]:
        return None
    partial = [dim for dim, size in enumerate(shape) if inside.shape[dim] != size]
    if not partial or any(size != 1 for size in inside.shape[: partial[-1]]):
        return None
    start = 0
    for offset, size in zip(inside.offset, shape, strict=True):
        start = start * size + offset
    itemsize = read.spec.itemsize_bytes
    return start * itemsize, (start + inside.num_elements) * itemsize


def _read_run(
    database: Database,
    read: ArrayRead,
    index: tuple[int, ...],
    start: int,
    end: int,
    like: Array,
) -> Array:
    """A run of a chunk's bytes: asks for whole digest blocks, verifies them, keeps what is wanted."""
    size_bytes = read.grid.box(index).num_elements * read.spec.itemsize_bytes
    first, last = start, end
    if read.digests is not None:
        first = start // DIGEST_BLOCK_BYTES * DIGEST_BLOCK_BYTES
        last = min(-(-end // DIGEST_BLOCK_BYTES) * DIGEST_BLOCK_BYTES, size_bytes)
    data = _read_key(database, read, index, first, last)
    if read.digests is not None:
        got = _digest_blocks(np.frombuffer(data, np.uint8))
        _compare_digests(database, read, index, got, first // DIGEST_BLOCK_BYTES)
    wanted = np.frombuffer(data, np.uint8, end - start, start - first)
    return wanted.view(like.dtype).reshape(like.shape)


def _read_key(
    database: Database, read: ArrayRead, index: tuple[int, ...], first: int, last: int
) -> bytes:
    """Bytes `first` to `last` of a chunk as it is stored."""
    key = f"{key_prefix(read.name)}{read.grid.key(index)}"
    try:
        request = database.requested.pop(key, None)
        if request is None:
            request = database.store.read(key, byte_range=slice(first, last))
        result = request.result()
    except (ValueError, OSError) as error:
        raise _corrupt(database.directory, f"array {read.name!r}", error) from error
    if result.state != "value" or len(result.value) != last - first:
        raise errors.CorruptCheckpointError(
            f"{database.directory}: chunk {key!r} is {result.state} with {len(result.value)} bytes; "
            f"expected {last - first} bytes.",
            path=database.directory,
            key_path=read.name,
        )
    database.count(last - first)
    return result.value


def verify_part(database: Database, read: ArrayRead, index: tuple[int, ...]) -> None:
    """Reads one chunk and verifies it, without keeping it."""
    whole = np.empty(read.grid.box(index).shape, numpy_dtype(read.spec.dtype))
    _read_chunk(database, read, index, whole)


def _read_chunk(database: Database, read: ArrayRead, index: tuple[int, ...], out: Array) -> None:
    """One whole chunk's valid region into contiguous memory, verified."""
    if out.nbytes <= _SMALL_CHUNK_BYTES and not read.grid.is_padded(index):
        as_bytes(out)[:] = _read_key(database, read, index, 0, out.nbytes)
    else:
        try:
            store = database.arrays.get(read.name)
            if store is None:
                store = _open_array(
                    database.store, read.name, read.spec, read.grid, database.context
                )
                database.arrays[read.name] = store
            ts.array(out).write(store[read.grid.box(index).slices()]).result()
        except (ValueError, OSError) as error:
            raise _corrupt(database.directory, f"array {read.name!r}", error) from error
        database.count(out.nbytes)
    if read.digests is not None:
        _compare_digests(database, read, index, _digest_blocks(out), 0)


def _compare_digests(
    database: Database, read: ArrayRead, index: tuple[int, ...], got: str, first_block: int
) -> None:
    """Raises unless `got` are the digests of a chunk from block `first_block` on."""
    offsets = digest_offsets(read.grid, read.spec.itemsize_bytes)
    begin = 16 * (offsets[read.grid.position(index)] + first_block)
    expected = (read.digests or "")[begin : begin + len(got)]
    if got == expected:
        return
    block = next(i for i in range(0, len(got), 16) if got[i : i + 16] != expected[i : i + 16])
    raise errors.CorruptCheckpointError(
        f"{database.directory}: array {read.name!r}, chunk {read.grid.key(index)!r}, bytes from "
        f"{(first_block + block // 16) * DIGEST_BLOCK_BYTES}: expected digest "
        f"{expected[block : block + 16]}, got {got[block : block + 16]}. The data changed after it "
        "was written; restore another step.",
        path=database.directory,
        key_path=read.name,
    )
